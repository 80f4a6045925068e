"""An experiment as a job: every cell is checked, then run, one after another or several at once; then the leaderboard.

Cells that are done are kept, interrupted ones continue, failed ones are said and tried again by the same command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
import yaml

from ray_dwm.analysis.grid import EXPERIMENT
from ray_dwm.analysis.leaderboard import Board
from ray_dwm.analysis.publish import LEADERBOARD, write_leaderboard
from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.manifest import MANIFEST, file_sha256, load_manifest
from ray_dwm.data.records import LOCK, locked, write_whole
from ray_dwm.engine.setup import evaluation_sets, target_sets
from ray_dwm.errors import ConfigError, DataError, Stopped, TrainingError, UserError
from ray_dwm.experimenting import Cell, ExperimentConfig, grid, needed
from ray_dwm.models.lm import parameter_count
from ray_dwm.orchestration.cells import Train, begin, check_cell, configure, fail, is_done, run_cell, tokens
from ray_dwm.orchestration.cluster import alive_nodes, connect, preflight, warn_if_temporary
from ray_dwm.orchestration.cluster import needed as resources
from ray_dwm.orchestration.doctor_config import disk_needed
from ray_dwm.orchestration.findings import count
from ray_dwm.orchestration.pool import Pool
from ray_dwm.orchestration.prepare import prepare_sets, sets_to_make
from ray_dwm.orchestration.train import train as train_run

Ready = Callable[[Sequence[RunConfig]], str]
"""Makes sure that the runs can be had, and says on what."""


def choose(experiment: ExperimentConfig, methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells of some methods and seeds (empty: of all), and those that they need.

    Raises:
        ConfigError: a method or seed is not declared.
    """
    cells = grid(experiment)
    for kind, given, declared in (("methods", methods, experiment.methods), ("seeds", seeds, experiment.seeds)):
        for each in given:
            if each not in declared:
                known = ", ".join(map(str, declared))
                raise ConfigError(f"--{kind} names {each}, which {experiment.name} does not have: {known}")
    wanted: set[Cell] = set()
    for cell in cells:
        if (not methods or cell.method in methods) and (not seeds or cell.seed in seeds):
            wanted |= {cell} | _all_needed(experiment, cell)
    return [cell for cell in cells if cell in wanted]


def _all_needed(experiment: ExperimentConfig, cell: Cell) -> set[Cell]:
    others = set(needed(experiment, cell).values())
    return others.union(*(_all_needed(experiment, other) for other in others))


def experiment(
    config: ExperimentConfig,
    cells: Sequence[Cell],
    *,
    parallel: int = 1,
    train: Train = train_run,
    ready: Ready | None = None,
) -> Board:
    """Run some cells, and write the leaderboard of all that are done.

    Args:
        parallel: cells at once, where the cluster has room.
        train: what runs a cell, one after another.
        ready: by default, joins the cluster, or starts one, and holds it against what the runs ask for.

    Returns:
        The leaderboard.

    Raises:
        UserError: before anything was started.
        Stopped: interrupted; the same command continues.
        TrainingError: cells have failed; the others are done.
    """
    warn_if_temporary("storage", config.storage)
    runs = check(config, cells)
    todo = [cell for cell in cells if not is_done(config, cell)]
    print(
        f"experiment {config.name}: {len(cells)} cells, {len(cells) - len(todo)} are done: {config.folder}", flush=True
    )
    config.folder.mkdir(parents=True, exist_ok=True)
    with locked(config.folder / LOCK, partial(_in_use, config)):
        write_whole(config.folder / EXPERIMENT, yaml.safe_dump(to_dict(config), sort_keys=False))
        try:
            device = (ready or make_ready)([runs[cell] for cell in todo]) if todo else ""
            if parallel > 1:
                failed = Pool(config, {cell: resources_of(runs[cell]) for cell in todo}, parallel, device).run()
            else:
                failed = _one_after_another(config, todo, train, device)
        except KeyboardInterrupt:
            done = f"{sum(is_done(config, cell) for cell in cells)} of {len(cells)} cells are done"
            raise Stopped(f"experiment {config.name} interrupted, {done}: the same command continues") from None
        finally:
            board = write_leaderboard(config.folder)
    if failed:
        names = ", ".join(cell.path for cell in failed)
        raise TrainingError(
            f"experiment {config.name}: {len(failed)} of {len(cells)} cells failed ({names}): "
            f"{config.folder / LEADERBOARD}.md has the reasons, the same command tries them again"
        )
    return board


def table(config: ExperimentConfig) -> Board:
    """Write the leaderboard of what is done, while cells are run elsewhere or not at all.

    Raises:
        UserError: nothing has been run yet.
    """
    if not config.folder.is_dir():
        raise UserError(f"experiment {config.folder} does not exist: run it without --only-table first")
    write_whole(config.folder / EXPERIMENT, yaml.safe_dump(to_dict(config), sort_keys=False))
    return write_leaderboard(config.folder)


def one_cell(config: ExperimentConfig, path: str) -> bool:
    """Run one cell, as a driver of its own; whether it is done is returned.

    Raises:
        ConfigError: there is no such cell.
    """
    cells = {cell.path: cell for cell in grid(config)}
    if path not in cells:
        raise ConfigError(f"--cell is {path}, which experiment {config.name} does not have")
    return run_cell(config, cells[path], train_run)


def _in_use(config: ExperimentConfig) -> None:
    raise UserError(f"experiment {config.folder} is in use by another process: wait for it, or choose another name=...")


def resources_of(run: RunConfig) -> Mapping[str, float]:
    """What a cell holds of the cluster."""
    return resources(run, run.cluster.most_workers)


def _one_after_another(config: ExperimentConfig, cells: Sequence[Cell], train: Train, device: str) -> list[Cell]:
    """Run cells in turn; those that have failed are returned."""
    failed: list[Cell] = []
    for number, cell in enumerate(cells, start=1):
        print(f"\n[{number} of {len(cells)}] {cell.path}", flush=True)
        lacking = [other.path for other in needed(config, cell).values() if other in failed]
        begin(config, cell, device, 1)
        if lacking:
            fail(config, cell, f"it needs {', '.join(lacking)}, which failed")
        if lacking or not run_cell(config, cell, train):
            failed.append(cell)
    return failed


def make_ready(runs: Sequence[RunConfig]) -> str:
    """Join the cluster, or start one for the largest run, and hold it against all of them."""
    connect(_largest(runs))
    asked: list[RunConfig] = []
    for run in runs:
        if not any(run.cluster == other.cluster and run.learns_dwm == other.learns_dwm for other in asked):
            preflight(run)
            asked.append(run)
    found, nodes = ray.cluster_resources(), alive_nodes()
    gpus = found.get("GPU", 0.0)
    if gpus:
        kinds = sorted(key.partition(":")[2] for key in found if key.startswith("accelerator_type:"))
        return f"{count(len(nodes), 'node')}, {gpus:g} x {', '.join(kinds) or 'GPU'}"
    return f"{count(len(nodes), 'node')}, CPU, {os.cpu_count()} cores where the driver is"


def _largest(runs: Sequence[RunConfig]) -> RunConfig:
    return max(runs, key=lambda run: resources_of(run)["CPU"])


def check(config: ExperimentConfig, cells: Sequence[Cell]) -> dict[Cell, RunConfig]:
    """Prepare data that are missing, then check every cell and that they can be compared; no run is started.

    Raises:
        UserError: naming the cell, key, file or folder, and the remedy.
    """
    runs = {cell: configure(config, cell) for cell in cells}
    for run in runs.values():
        if sets_to_make(run, missing_only=True):
            connect(_largest(list(runs.values())))
            prepare_sets(run, missing_only=True)
    for cell, run in runs.items():
        try:
            check_cell(config, cell, run)
        except UserError as error:
            raise type(error)(f"{cell.path}: {error}") from None
    _check_comparable(config, runs)
    _check_disk(config, {cell: run for cell, run in runs.items() if not is_done(config, cell)})
    return runs


def _check_comparable(config: ExperimentConfig, runs: Mapping[Cell, RunConfig]) -> None:
    """One tokenizer and one deciding set for all; one budget and one way to evaluate within a size."""
    digests = {cell: _set_digests(run) for cell, run in runs.items()}
    firsts: dict[str, Cell] = {}
    anywhere = next(iter(runs))
    for cell, run in runs.items():
        _check_measure(config, cell, digests[cell])
        _require_same(
            config, anywhere, cell, "tokenizer of data.train", *(_tokenizer(runs[c]) for c in (anywhere, cell))
        )
        _require_same(
            config, anywhere, cell, f"set {config.measure}", *(digests[c][config.measure] for c in (anywhere, cell))
        )
        first = firsts.setdefault(cell.size, cell)
        for what, one, other in zip(_BUDGET, _budget(runs[first]), _budget(run), strict=True):
            _require_same(config, first, cell, what, one, other)
        every, steps = run.train.eval_every, run.train.steps
        if steps // every < 2:
            raise ConfigError(
                f"{cell.path}: train.eval_every is {every} with train.steps = {steps}: too few points for a curve, "
                "lower train.eval_every to at most half of the steps"
            )
        if cell.again and run.learns_dwm and run.bilevel.every == 0:
            raise ConfigError(
                f"repeat is {cell.method}, whose bilevel.every=0 lets clocks decide: no two runs are alike"
            )


_BUDGET = ("tokens", "lm.preset", "train.global_batch", "train.eval_every", "train.eval_sequences")


def _budget(run: RunConfig) -> tuple[object, ...]:
    train = run.train
    return tokens(run), run.lm.preset, train.global_batch, train.eval_every, train.eval_sequences


def _tokenizer(run: RunConfig) -> str:
    manifest = load_manifest(run.data.train)
    return f"{manifest.tokenizer_name} ({manifest.tokenizer_sha256[:8]})"


def _set_digests(run: RunConfig) -> dict[str, str]:
    sets = {"train": run.data.train, **evaluation_sets(run)}
    return {name: file_sha256(Path(folder).expanduser() / MANIFEST) for name, folder in sets.items()}


def _check_measure(config: ExperimentConfig, cell: Cell, digests: Mapping[str, str]) -> None:
    run, name = configure(config, cell), config.measure
    if name not in evaluation_sets(run):
        raise ConfigError(
            f"{cell.path}: measure is {name!r}, and there is no such evaluation set: they are "
            f"{', '.join(evaluation_sets(run))}"
        )
    learnt = ["train", *target_sets(run)]
    if name not in learnt and any(digests[other] == digests[name] for other in learnt):
        raise DataError(f"{cell.path}: the held-out set {name}, by which the experiment decides, is also learnt from")


def _require_same(config: ExperimentConfig, first: Cell, cell: Cell, what: str, one: object, other: object) -> None:
    if one != other:
        raise ConfigError(
            f"experiment {config.name}: {what} is {one} in {first.path} and {other} in {cell.path}: cells that are "
            "compared must have the same"
        )


def _check_disk(config: ExperimentConfig, runs: Mapping[Cell, RunConfig]) -> None:
    wanted = 0
    for run in runs.values():
        vocabulary = load_manifest(run.data.train).vocab_size
        wanted += sum(disk_needed(run, parameter_count(run.lm.preset, vocabulary)).values())
    place = next(folder for folder in (config.folder, *config.folder.parents) if folder.is_dir())
    if not os.access(place, os.W_OK):
        raise UserError(f"{config.folder} cannot be written: choose another storage=...")
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise UserError(
            f"experiment {config.name} needs about {wanted / 2**30:.1f} GiB for {len(runs)} cells, "
            f"{free / 2**30:.1f} GiB are free: free space, choose another storage=..., or lower checkpoint.keep"
        )
