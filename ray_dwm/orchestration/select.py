"""Selection as a job: score the pool on Ray Data, choose rows that fit the budget, write them as token shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.manifest import MANIFEST, DomainStats, Manifest, ShardFile, file_sha256, load_manifest
from ray_dwm.data.records import LOCK, locked, read_json, write_whole
from ray_dwm.data.tokenization import FOLDER, copy_tokenizer
from ray_dwm.errors import ConfigError, Stopped, UserError
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.doremi import DomainWeights, plan_domain_weights
from ray_dwm.orchestration.proxies import Proxy, plan_proxies, ready_proxies
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.selection import record, scores
from ray_dwm.selection.method import Scored, Task, applies
from ray_dwm.selection.methods import METHODS, score
from ray_dwm.selection.targets import read_targets
from ray_dwm.selection.write import ROWS_PER_FILE, write_part


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
    def scores_of(self) -> dict[str, Any]:
        """What the scores depend on."""
        depends = METHODS[self.method].depends
        return {
            "method": self.method,
            "options": depends(self.config.selection) if depends else self._options,
            "seed": self.config.seed,
            "pool": _digest(self.pool),
            "targets": {name: _digest(manifest) for name, manifest in self.targets.items()},
            **({"proxies": [proxy.digest for proxy in self.proxies]} if self.proxies else {}),
        }

    @property
    def depends_on(self) -> dict[str, Any]:
        """What the chosen rows depend on."""
        s = self.config.selection
        choice = {"rows": self.rows, "stratified": s.stratified, "temperature": s.temperature, "choice": self._options}
        weights = {} if self.domain_weights is None else {"domain_weights": self.domain_weights.digest}
        return {**self.scores_of, **choice, **weights}

    @property
    def _options(self) -> dict[str, Any]:
        return dict(to_dict(self.config.selection).get(self.method, {}))


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
    folder = Path(config.selection.output).expanduser().absolute() if config.selection.output else _inline(selection)
    return dataclasses.replace(selection, folder=folder)


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
    return storage / "selections" / f"{selection.method}-{_hash(selection.depends_on)[:12]}"


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(manifest: Manifest) -> str:
    return file_sha256(manifest.folder / MANIFEST)


def select(config: RunConfig) -> Path:
    """Make the selection that a configuration names, unless it is there already.

    Returns:
        Its folder of token shards.

    Raises:
        UserError: before anything was started, or where the data do not allow it; no half-written folder is left.
    """
    selection = plan_selection(config)
    folder = selection.folder
    if folder.exists():
        _require_same(selection)
        print(f"selection by {selection.method} is there already: {folder}", flush=True)
        return folder
    print(record.opening(selection.method, selection.pool, selection.rows, selection.targets), flush=True)
    connect(config)
    try:
        with work_folder(selection) as work:
            if folder.exists():  # made by another process in the meantime
                _require_same(selection)
                return folder
            _fill(selection, work)
            os.rename(work / "shards", folder)
    except KeyboardInterrupt:
        raise Stopped(f"selection {folder} interrupted: the same command continues from its finished blocks") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): free space or choose another folder") from None
    print(record.table(read_json(folder / record.RECORD)), f"selection: {folder}", sep="\n", flush=True)
    return folder


def with_selection(config: RunConfig) -> RunConfig:
    """The configuration with the selected shards in the pool's place, after they have been made.

    A run that chooses its data in stages keeps the pool.
    """
    if config.data.selection == "none" or config.in_stages:
        return config
    folder = select(config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(folder), selection="none"))


def _require_same(selection: Selection) -> None:
    if not _holds(selection.folder / record.RECORD, {"depends_on": selection.depends_on}):
        raise UserError(f"{selection.folder} exists already and is another selection: choose another output folder")


def _holds(path: Path, content: dict[str, Any]) -> bool:
    """Whether there is a JSON file that says at least this."""
    return path.is_file() and content.items() <= read_json(path).items()


@contextmanager
def work_folder(selection: Selection) -> Iterator[Path]:
    """Where blocks are kept until the body has ended well; what another selection has left there goes.

    Processes that make the same output take turns.
    """
    work = selection.folder.parent / f".{selection.folder.name}.work"
    key = work / "key.json"
    content = json.dumps({**selection.depends_on, "block_tokens": selection.config.selection.block_tokens})
    work.mkdir(parents=True, exist_ok=True)
    waiting = partial(print, f"another process is at work on {selection.folder}: waiting for it", flush=True)
    with locked(work / LOCK, waiting):
        work.mkdir(exist_ok=True)  # who was waited for has removed it
        if not key.exists() or read_json(key) != json.loads(content):
            for path in work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        (work / "shards").mkdir(parents=True, exist_ok=True)
        write_whole(key, content)
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _fill(selection: Selection, work: Path) -> None:
    started = time.monotonic()
    config, pool, method = selection.config, selection.pool, METHODS[selection.method]
    sweep = RaySweep(work, config.selection)
    task = task_of(selection, sweep)
    if (weights := selection.domain_weights) is not None:
        ready = weights.ready(pool, selection.rows, sweep, work / "shards")
        task = dataclasses.replace(task, domain_weights=ready)
    scored = scored_pool(selection, task, work)
    rows = method.choose(task, scored, selection.rows)
    files, domains = _write_rows(selection, sweep, work, rows)
    shards = work / "shards"
    dataclasses.replace(
        pool,
        folder=shards,
        files=files,
        domains=domains,
        made_by={"command": "select", "method": selection.method, "ordered": method.ordered, "pool": pool.folder.name},
    ).write()
    copy_tokenizer(pool.folder / FOLDER, shards / FOLDER)
    content = {
        "method": selection.method,
        "depends_on": selection.depends_on,
        "options": to_dict(config.selection),
        "notes": task.notes,
        **record.describe(pool, scored, rows),
        "seconds": time.monotonic() - started,
    }
    write_whole(shards / record.RECORD, json.dumps(content, indent=2) + "\n")


def task_of(selection: Selection, sweep: RaySweep) -> Task:
    """What the method is given, its proxies ready."""
    config, pool = selection.config, selection.pool
    return Task(
        options=config.selection,
        seed=config.seed,
        pool=pool,
        targets=selection.targets,
        sweep=sweep,
        proxies=() if config.selection.scores else ready_proxies(selection.proxies, pool, sweep),
    )


def scored_pool(selection: Selection, task: Task, work: Path) -> Scored:
    """Scores of the whole pool, from a file or by the method; where they are kept, in the shards of the work folder."""
    options, digest = task.options, _hash(selection.scores_of)
    if options.scores:
        scored = scores.read(Path(options.scores).expanduser(), task.pool, digest)
    else:
        blocks = score(selection.method, task)
        if options.keep_scores:
            blocks = scores.kept(work / "shards" / scores.FILE, blocks, task.pool, digest)
        scored = scores.gather(blocks, task.pool)
    scores.require_usable(scored, selection.method)
    return scored


def _write_rows(
    selection: Selection, sweep: RaySweep, work: Path, rows: NDArray[np.int64]
) -> tuple[tuple[ShardFile, ...], dict[str, DomainStats]]:
    """The chosen rows as shards: their files, and what they hold of each domain."""
    pool, rows_file, reports = selection.pool, work / "rows.npy", work / "parts"
    reports.mkdir(exist_ok=True)
    np.save(rows_file, rows)
    paths = [reports / f"{number:05d}.json" for number in range(-(-len(rows) // ROWS_PER_FILE))]
    sweep.each(
        "writing shards",
        [number for number, path in enumerate(paths) if not path.exists()],
        partial(_write_part, pool=str(pool.folder), rows_file=str(rows_file), work=str(work)),
    )
    parts = [read_json(path) for path in paths]
    counts = np.sum([part["rows"] for part in parts], axis=0)
    domains = {
        name: DomainStats(
            rows=int(count),
            tokens=int(count) * pool.seq_len,
            bytes_per_token=pool.domains[name].bytes_per_token,  # the whole domain's: texts are not counted again
        )
        for name, count in zip(pool.domain_names, counts, strict=True)
        if count
    }
    return tuple(ShardFile(**part["shard"]) for part in parts), domains


def _write_part(number: int, *, pool: str, rows_file: str, work: str) -> None:
    report = write_part(number, pool=pool, rows_file=rows_file, output=f"{work}/shards")
    write_whole(Path(work) / "parts" / f"{number:05d}.json", json.dumps(report))
