"""One cell of an experiment as a run: what it takes from other cells, whether it is done, and how it is run.

Selections and the proxy LMs behind them lie in the experiment's folder, because cells share them; runs lie below, each
in the folder of its cell.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_dwm.analysis.grid import record_path
from ray_dwm.analysis.runs import versions
from ray_dwm.config import DwmConfig, RunConfig, WeightingConfig
from ray_dwm.config.experiment import NEEDS, Cell, ExperimentConfig, needed, run_config
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.records import read_json, write_whole
from ray_dwm.engine.checks import check_checkpoint, check_data, seq_len
from ray_dwm.engine.rundir import check, stop_path
from ray_dwm.errors import DwmError, Stopped, TrainingError
from ray_dwm.logs import say
from ray_dwm.models.folders import newest_dwm
from ray_dwm.orchestration.mates import check_stages
from ray_dwm.orchestration.run import absolute
from ray_dwm.orchestration.select import plan_inline, with_selection

Train = Callable[[RunConfig], Any]


def is_done(experiment: ExperimentConfig, cell: Cell) -> bool:
    """Whether its run is complete."""
    return (experiment.folder / cell.path / "summary.json").is_file()


def configure(experiment: ExperimentConfig, cell: Cell) -> RunConfig:
    """Its run, as declared; of what is still to be left by other cells, the places where it will be.

    Raises:
        ConfigError: naming the cell.
    """
    given = {key: str(_left(experiment, key, other)) for key, other in needed(experiment, cell).items()}
    return run_config(experiment, cell, given)


def _left(experiment: ExperimentConfig, key: str, other: Cell) -> Path:
    run = experiment.folder / other.path
    if NEEDS[key] == "run":
        return run
    return run / "dwm" if NEEDS[key] == "dwm" else newest_dwm(run / "dwm") or run / "dwm" / "newest"


def check_cell(experiment: ExperimentConfig, cell: Cell, config: RunConfig) -> None:
    """Check, once its data are prepared, whether a cell can be run, or was run as declared; starts nothing.

    Raises:
        UserError: naming the key, file or folder and the remedy.
    """
    if not all(is_done(experiment, other) for other in needed(experiment, cell).values()):
        check_data(_without_what_is_left(config))  # the rest is checked when it is there
        return
    config = with_budget(config)
    manifest = check_data(config)
    if config.in_stages:
        check_stages(config, manifest)
    elif config.data.selection != "none":
        folder = plan_inline(config).folder
        if not folder.exists():  # and no run that was made from it
            return
        config = _selected(config, folder)
    config = absolute(_in_its_folder(experiment, cell, config))
    check(config)
    check_checkpoint(config, manifest)


def _without_what_is_left(config: RunConfig) -> RunConfig:
    """The run without what is not there yet."""
    data = dataclasses.replace(config.data, selection="none")
    dwm = DwmConfig(mode="learn") if config.dwm.init_from or config.dwm.trajectory else config.dwm
    weighting = WeightingConfig(method="uniform") if config.weighting.method == "group_dro" else config.weighting
    return dataclasses.replace(config, data=data, dwm=dwm, weighting=weighting)


def with_budget(config: RunConfig) -> RunConfig:
    """With as many tokens to be selected as are trained on, where it does not say."""
    if config.data.selection == "none" or config.in_stages or config.selection.budget:
        return config
    manifest = load_manifest(config.data.train)
    budget = config.train.steps * config.train.global_batch * manifest.seq_len
    return dataclasses.replace(config, selection=dataclasses.replace(config.selection, budget=budget))


def tokens(config: RunConfig) -> int:
    """What a run trains on."""
    return config.train.steps * config.train.global_batch * seq_len(config, load_manifest(config.data.train))


def _selected(config: RunConfig, folder: Path) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(folder), selection="none"))


def _in_its_folder(experiment: ExperimentConfig, cell: Cell, config: RunConfig) -> RunConfig:
    run = experiment.folder / cell.path
    return dataclasses.replace(config, storage=str(run.parent), name=run.name)


def run_cell(experiment: ExperimentConfig, cell: Cell, train: Train) -> bool:
    """Run a cell to its end, or continue it; how it went is written down.

    Returns:
        Whether it is done. Where it failed, others may go on.

    Raises:
        Stopped: it was asked to end; the same command continues.
    """
    path = record_path(experiment.folder, cell)
    needs = {key: other.path for key, other in needed(experiment, cell).items()}
    record = {**_read(path), "state": "running", "needs": needs}
    write_record(path, record)
    try:
        config = with_budget(configure(experiment, cell))
        chosen = with_selection(config)
        if chosen is not config:
            record["selection"] = chosen.data.train
            write_record(path, record)
        _train(train, _in_its_folder(experiment, cell, chosen))
    except Stopped as stopped:
        raise Stopped(f"{cell.path}: {stopped}") from None
    except Exception as error:  # whatever it is, the other cells have nothing to do with it
        if not isinstance(error, DwmError):
            traceback.print_exc()
        fail(experiment, cell, str(error) if isinstance(error, DwmError) else f"{type(error).__name__}: {error}")
        return False
    write_record(path, {**record, "state": "done"})
    return True


def _train(train: Train, config: RunConfig) -> None:
    try:
        train(config)
    except TrainingError as error:
        if stop_path(config).exists():  # not its failure
            raise Stopped(str(error)) from None
        raise


def begin(experiment: ExperimentConfig, cell: Cell, device: str, at_once: int) -> None:
    """Write down on what a cell is about to run, and how many at once do; what it ran on before stays."""
    path = record_path(experiment.folder, cell)
    before = _read(path)
    devices = sorted({*before.get("devices", []), device})
    most = max(at_once, before.get("at_once", 1))
    write_record(path, {**before, "state": "running", "devices": devices, "at_once": most, "versions": versions()})


def fail(experiment: ExperimentConfig, cell: Cell, reason: str) -> None:
    """Write down, and say, why a cell is not done."""
    say(f"warning: {cell.path} failed: {reason}")
    path = record_path(experiment.folder, cell)
    write_record(path, {**_read(path), "state": "failed", "reason": " ".join(reason.split())})


def has_failed(experiment: ExperimentConfig, cell: Cell) -> bool:
    """Whether it is written down that it has."""
    return bool(_read(record_path(experiment.folder, cell)).get("state") == "failed")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write down how a cell went."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2) + "\n")
