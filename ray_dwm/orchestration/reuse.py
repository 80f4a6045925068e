"""Finished runs of another experiment, copied where they are what a cell would compute."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from ray_dwm.analysis.grid import Grid, read_grid, record_path
from ray_dwm.config import RunConfig
from ray_dwm.config.experiment import Cell, ExperimentConfig
from ray_dwm.data.records import LOCK, alone_in
from ray_dwm.engine.rundir import check
from ray_dwm.errors import UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cells import write_record
from ray_dwm.orchestration.run import absolute


def take_over(experiment: ExperimentConfig, runs: Mapping[Cell, RunConfig], folder: Path) -> None:
    """Copy what another experiment has finished into cells that have not been begun.

    A run is copied where configuration, data and seed are the cell's, as they must be for a run to be continued. So
    none is of those that take something from another cell, whose folders are their own experiment's; and a repetition
    is run, for that is what it is for.

    Raises:
        UserError: the folder is no experiment's.
    """
    other = read_grid(folder.expanduser().absolute())
    experiment.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(experiment.folder, "experiment"):
        for cell, config in runs.items():
            if cell.again or (experiment.folder / cell.path).exists():
                continue
            of_seed = {done: outcome.run.folder for done, outcome in other.outcomes.items() if done.seed == cell.seed}
            if (source := next((done for done, run in of_seed.items() if _is_same(config, run)), None)) is not None:
                _take(experiment, cell, other, source)


def _is_same(config: RunConfig, run: Path) -> bool:
    """Whether a run could be continued by this configuration."""
    try:
        check(absolute(dataclasses.replace(config, storage=str(run.parent), name=run.name)))
    except UserError:
        return False
    return True


def _take(experiment: ExperimentConfig, cell: Cell, other: Grid, source: Cell) -> None:
    run, target = other.outcomes[source].run.folder, experiment.folder / cell.path
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        shutil.copytree(run, fresh, symlinks=True, ignore=shutil.ignore_patterns(LOCK))
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    write_record(record_path(experiment.folder, cell), {**other.records[source], "taken_from": str(run)})
    say(f"{cell.path} is {run}, which is configured alike")
