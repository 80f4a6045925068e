"""Selection as a job: score the pool on Ray Data, choose rows that fit the budget, write them as token shards."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.manifest import MANIFEST, Manifest, file_sha256, load_manifest
from ray_dwm.data.records import digest, read_json, write_whole
from ray_dwm.data.shards import open_shards
from ray_dwm.data.tokenization import FOLDER, copy_tokenizer
from ray_dwm.engine.checks import check_data
from ray_dwm.errors import ConfigError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cluster import connect, warn_if_temporary
from ray_dwm.orchestration.doremi import DomainWeights, plan_domain_weights
from ray_dwm.orchestration.proxies import Proxy, plan_proxies, ready_proxies
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import PROXIES, SHARDS, spent, timed, work_folder, work_path
from ray_dwm.orchestration.write import write_rows
from ray_dwm.selection import record, scores
from ray_dwm.selection.method import Scored, Task, applies
from ray_dwm.selection.methods import METHODS, score
from ray_dwm.selection.targets import read_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """A selection that can be made: everything about it is checked."""

    config: RunConfig
    pool: Manifest
    targets: dict[str, Manifest]
    rows: int
    """To be chosen."""
    folder: Path
    proxies: tuple[Proxy, ...]
    domain_weights: DomainWeights | None

    @property
    def method(self) -> str:
        """Its name."""
        return self.config.data.selection

    @property
    def made_by(self) -> dict[str, Any]:
        """What the manifest of its shards says of their origin."""
        ordered = METHODS[self.method].ordered
        return {"command": "select", "method": self.method, "ordered": ordered, "pool": self.pool.folder.name}

    @property
    def scores_of(self) -> dict[str, Any]:
        """What the scores depend on."""
        depends = METHODS[self.method].depends
        return {
            "method": self.method,
            "options": depends(self.config.selection) if depends else self._options,
            "seed": self.config.selection_seed,
            "pool": _digest(self.pool),
            "targets": {name: _digest(manifest) for name, manifest in self.targets.items()},
            **({"proxies": [proxy.digest for proxy in self.proxies]} if self.proxies else {}),
        }

    @property
    def depends_on(self) -> dict[str, Any]:
        """What the chosen rows depend on."""
        s = self.config.selection
        choice = {"rows": self.rows, "stratified": s.stratified, "temperature": s.temperature, "choice": self._choice}
        weights = {} if self.domain_weights is None else {"domain_weights": self.domain_weights.digest}
        return {**self.scores_of, **choice, **weights}

    @property
    def _options(self) -> dict[str, Any]:
        return dict(to_dict(self.config.selection).get(self.method, {}))

    @property
    def _choice(self) -> dict[str, Any]:
        elsewhere = METHODS[self.method].elsewhere
        return {key: value for key, value in self._options.items() if key not in elsewhere}


def plan_selection(config: RunConfig) -> Selection:
    """Check whether a selection can be made; starts nothing.

    Raises:
        UserError: naming the key or file and the remedy.
    """
    if config.data.selection == "none":
        raise ConfigError(f"data.selection is none: name a method, one of {', '.join(METHODS)}")
    method = METHODS[config.data.selection]
    if not config.data.train:
        raise ConfigError("data.train is empty: name the pool, a folder of token shards (--pool)")
    pool = load_manifest(config.data.train)
    targets = read_targets(config, pool) if applies(method.targeted, config.selection) else {}
    rows = _rows(config, pool)
    method.check(config.selection, pool, rows)
    selection = Selection(
        config=config,
        pool=pool,
        targets=targets,
        rows=rows,
        folder=Path(config.selection.output),
        proxies=plan_proxies(config, pool, method.check_proxy) if applies(method.proxies, config.selection) else (),
        domain_weights=plan_domain_weights(config, pool) if method.domain_weights else None,
    )
    if config.selection.scores:
        scores.check(Path(config.selection.scores).expanduser(), pool, digest(selection.scores_of))
    folder = Path(config.selection.output).expanduser().absolute() if config.selection.output else _inline(selection)
    return dataclasses.replace(selection, folder=folder)


def plan_inline(config: RunConfig) -> Selection:
    """Check whether a run can select and then train on what it has selected; starts nothing.

    Raises:
        UserError: naming the key or file and the remedy.
    """
    check_data(config)  # of the pool: what of the run is wrong is told before hours of scoring
    selection, batch = plan_selection(config), config.train.global_batch
    if selection.rows < batch:
        raise ConfigError(
            f"selection.budget is {config.selection.budget} tokens, {selection.rows} sequences, and train.global_batch "
            f"is {batch}: select more, or lower the batch"
        )
    return selection


def _rows(config: RunConfig, pool: Manifest) -> int:
    budget, tokens = config.selection.budget, pool.rows * pool.seq_len
    if budget < pool.seq_len:
        raise ConfigError(
            f"selection.budget is {budget} tokens: it must be at least one sequence of {pool.seq_len} (--budget)"
        )
    if budget > tokens:
        raise ConfigError(f"selection.budget is {budget} tokens, the pool {pool.folder} has {tokens}: lower it")
    return budget // pool.seq_len


def _inline(selection: Selection) -> Path:
    storage = Path(selection.config.storage).expanduser().absolute()
    return storage / "selections" / f"{selection.method}-{digest(selection.depends_on)[:12]}"


def _digest(manifest: Manifest) -> str:
    return file_sha256(manifest.folder / MANIFEST)


def select(config: RunConfig) -> Path:
    """Make the selection that a configuration names, unless it is there already.

    Returns:
        Its folder of token shards.

    Raises:
        UserError: before anything was started, or where the data do not allow it; no half-written folder is left.
    """
    return _make(plan_selection(config))


def _make(selection: Selection) -> Path:
    config, folder = selection.config, selection.folder
    if folder.exists():
        _require_same(selection)
        shutil.rmtree(work_path(folder), ignore_errors=True)  # a kill may have left it
        say(f"selection by {selection.method} is there already: {folder}")
        return folder
    output = config.selection.output
    warn_if_temporary("selection.output" if output else "storage", output or config.storage)
    say(record.opening(selection.method, selection.pool, selection.rows, selection.targets))
    connect(config)
    with work_folder(folder, selection.depends_on) as work:
        if folder.exists():  # made by another process in the meantime
            _require_same(selection)
            return folder
        with timed(work) as seconds:
            _fill(selection, work, seconds)
        os.rename(work / SHARDS, folder)
    say(f"{record.table(read_json(folder / record.RECORD))}\nselection: {folder}")
    return folder


def with_selection(config: RunConfig) -> RunConfig:
    """The configuration with the selected shards in the pool's place, after they have been made.

    A run that chooses its data in stages keeps the pool.

    Raises:
        UserError: before anything was started, or where the data do not allow it.
    """
    if config.data.selection == "none" or config.in_stages:
        return config
    folder = _make(plan_inline(config))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(folder), selection="none"))


def _require_same(selection: Selection) -> None:
    folder = selection.folder
    stored = folder / record.RECORD
    if not stored.is_file() or read_json(stored).get("depends_on") != selection.depends_on:
        raise UserError(f"{folder} exists already and is another selection: choose another output folder")
    if selection.config.selection.keep_scores and not (folder / scores.FILE).exists():
        raise UserError(f"{folder} exists already, without scores: remove it, or choose another output folder")


def _fill(selection: Selection, work: Path, seconds: Callable[[], float]) -> None:
    config, pool, method = selection.config, selection.pool, METHODS[selection.method]
    sweep, shards = RaySweep(work, config.selection), work / SHARDS
    task = task_of(selection, sweep)
    if (weights := selection.domain_weights) is not None:
        task = dataclasses.replace(task, domain_weights=weights.ready(pool, selection.rows, sweep, shards))
    scored = scored_pool(selection, task, work)
    rows = method.choose(task, scored, selection.rows)
    files, domains = write_rows(rows, pool, sweep, work)
    dataclasses.replace(pool, folder=shards, files=files, domains=domains, made_by=selection.made_by).write()
    copy_tokenizer(pool.folder / FOLDER, shards / FOLDER)
    content = {
        "method": selection.method,
        "depends_on": selection.depends_on,
        "options": to_dict(config.selection),
        "folders": {
            "pool": str(pool.folder),
            "targets": {name: str(manifest.folder) for name, manifest in selection.targets.items()},
            "proxies": [str(proxy.folder) for proxy in selection.proxies],
        },
        "notes": task.notes,
        **record.describe(pool, scored, rows),
        "seconds": seconds(),
        "proxy_seconds": spent(work, PROXIES),
    }
    write_whole(shards / record.RECORD, json.dumps(content, indent=2) + "\n")
    for left in shards.glob(".*.tmp"):  # by a kill
        left.unlink()
    if config.selection.keep_scores:
        os.replace(work / scores.FILE, shards / scores.FILE)


def task_of(selection: Selection, sweep: RaySweep) -> Task:
    """What the method is given: its data, compared with their checksums, and its proxies, ready.

    Raises:
        DataError: a shard is damaged, which nobody would see any more once its rows have been written anew.
    """
    config, pool = selection.config, selection.pool
    for manifest in (pool, *selection.targets.values()):
        open_shards(str(manifest.folder)).verify()
    return Task(
        options=config.selection,
        seed=config.selection_seed,
        pool=pool,
        targets=selection.targets,
        sweep=sweep,
        scratch=str(sweep.work),
        proxies=() if config.selection.scores else ready_proxies(selection.proxies, pool, sweep),
    )


def scored_pool(selection: Selection, task: Task, work: Path) -> Scored:
    """Scores of the whole pool, from a file or by the method; where they are kept, in the work folder."""
    options, key, kept = task.options, digest(selection.scores_of), work / scores.FILE
    if options.scores:
        given = Path(options.scores).expanduser()
        scored = scores.read(given, task.pool, key)
        if options.keep_scores:
            shutil.copyfile(given, kept)
    else:
        blocks = score(selection.method, task)
        scored = scores.gather(scores.kept(kept, blocks, task.pool, key) if options.keep_scores else blocks, task.pool)
    scores.require_usable(scored, selection.method)
    return scored
