"""An experiment as a job: every cell is checked, then run, one after another or several at once; then the leaderboard.

Cells that are done are kept, interrupted ones continue, failed ones are said and tried again by the same command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ray
import yaml

from ray_dwm.analysis.grid import EXPERIMENT, read_grid
from ray_dwm.analysis.leaderboard import Board
from ray_dwm.analysis.overlaps import look
from ray_dwm.analysis.publish import LEADERBOARD, write_leaderboard
from ray_dwm.config import RunConfig, to_dict
from ray_dwm.config.experiment import Cell, ExperimentConfig, grid, needed
from ray_dwm.data.records import LOCK, alone_in, is_locked, write_whole
from ray_dwm.errors import ConfigError, Stopped, TrainingError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cells import Train, begin, fail, is_done, run_cell
from ray_dwm.orchestration.cluster import alive_nodes, connect, preflight, warn_if_temporary
from ray_dwm.orchestration.experiment_checks import check, largest, resources_of
from ray_dwm.orchestration.findings import count
from ray_dwm.orchestration.pool import Pool
from ray_dwm.orchestration.reuse import take_over
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
    reuse: Path | None = None,
    train: Train = train_run,
    ready: Ready | None = None,
) -> Board:
    """Run some cells, and write the leaderboard of all that are done.

    Args:
        parallel: cells at once, where the cluster has room.
        reuse: folder of another experiment, whose finished runs are copied where they are configured alike.
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
    runs = check(config, [cell for cell in grid(config) if cell in cells or is_done(config, cell)], parallel)
    if reuse is not None:
        take_over(config, {cell: runs[cell] for cell in cells}, reuse)
    todo = [cell for cell in cells if not is_done(config, cell)]
    told = f"{len(cells)} cells, {len(cells) - len(todo)} are done"
    say(f"experiment {config.name}: {told}: {config.folder}")
    device = (ready or partial(make_ready, at_once=parallel))([runs[cell] for cell in todo]) if todo else ""
    config.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(config.folder, "experiment"):
        write_whole(config.folder / EXPERIMENT, yaml.safe_dump(to_dict(config), sort_keys=False))
        try:
            if parallel > 1:
                failed = Pool(config, {cell: resources_of(runs[cell]) for cell in todo}, parallel, device).run()
            else:
                failed = _one_after_another(config, todo, train, device)
            _look(config)
            if config.analyze and not failed:
                _analyze(config)
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
    if not is_locked(config.folder / LOCK):  # else those at work have written what they go by
        write_whole(config.folder / EXPERIMENT, yaml.safe_dump(to_dict(config), sort_keys=False))
    _look(config)
    return write_leaderboard(config.folder)


def _look(config: ExperimentConfig) -> None:
    """Compare the sets of what is done, once for all cells that have the same."""
    look([outcome.run for outcome in read_grid(config.folder).outcomes.values()])


def _analyze(config: ExperimentConfig) -> None:
    """Measure what the weights of some methods preferred, with each run's baseline as the reference LM."""
    from ray_dwm.orchestration.analyze import Analysis, analyze  # five seconds, which no cell's driver needs

    for cell in grid(config):
        if cell.method in config.analyze and not cell.again and is_done(config, cell):
            pair = (Cell(cell.size, config.baseline, cell.seed), cell)
            runs = [config.folder / each.path for each in pair if is_done(config, each)]
            analyze(runs, Analysis(output=config.folder / cell.path / "report.html"))


def one_cell(config: ExperimentConfig, path: str) -> bool:
    """Run one cell, as a driver of its own; whether it is done is returned.

    Raises:
        ConfigError: there is no such cell.
    """
    cells = {cell.path: cell for cell in grid(config)}
    if path not in cells:
        raise ConfigError(f"--cell is {path}, which experiment {config.name} does not have")
    return run_cell(config, cells[path], train_run)


def _one_after_another(config: ExperimentConfig, cells: Sequence[Cell], train: Train, device: str) -> list[Cell]:
    """Run cells in turn; those that have failed are returned."""
    failed: list[Cell] = []
    for number, cell in enumerate(cells, start=1):
        say(f"[{number} of {len(cells)}] {cell.path}")
        lacking = [other.path for other in needed(config, cell).values() if other in failed]
        if lacking:
            fail(config, cell, f"it needs {', '.join(lacking)}, which failed")
            failed.append(cell)
            continue
        begin(config, cell, device, 1)
        if not run_cell(config, cell, train):
            failed.append(cell)
    return failed


def make_ready(runs: Sequence[RunConfig], at_once: int = 1) -> str:
    """Join the cluster, or start one for as many of the largest run, and hold it against all of them."""
    connect(largest(runs), at_once)
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
