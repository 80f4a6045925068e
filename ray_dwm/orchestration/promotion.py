"""From one scale to the next: an experiment of the best settings and the controls, and what it has found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ray_dwm.analysis.grid import read_grid
from ray_dwm.analysis.tuning import Row, Trial
from ray_dwm.config import RunConfig
from ray_dwm.config.experiment import ExperimentConfig, MethodConfig, SizeConfig
from ray_dwm.config.tune import UNIFORM, TuneConfig, scale_config, with_values
from ray_dwm.models.folders import newest_dwm
from ray_dwm.orchestration.study import TRIALS

_LABELS = {"replay": "its DWMs replayed", "frozen": "its last DWM, frozen", "adapt": "its last DWM, adapted"}
Dwms = dict[str, Path]
"""Trial -> the dwm folder that it has left at the scale before."""


def dwms_of(config: TuneConfig, chosen: Sequence[Trial]) -> Dwms:
    """What promoted trials have learnt at the first scale; a trial without a DWM has none."""
    folders = {trial.id: config.folder / TRIALS / trial.id / "dwm" for trial in chosen}
    return _learnt(folders)


def _learnt(folders: Dwms) -> Dwms:
    there = {name: folder for name, folder in folders.items() if (folder / "trajectory.json").is_file()}
    return {name: folder for name, folder in there.items() if newest_dwm(folder) is not None}


def promoted(config: TuneConfig, scale: str, chosen: Sequence[Trial], dwms: Dwms) -> ExperimentConfig:
    """The experiment of a scale: uniform, the defaults, and each chosen setting learnt anew and by its given DWM.

    Args:
        dwms: the folders that the scale before has left.
    """
    here, methods = config.scales[scale], {"uniform": MethodConfig(set=dict(UNIFORM)), "defaults": MethodConfig()}
    for trial in chosen:
        values, name = {key: str(value) for key, value in trial.values.items()}, _method(trial.id, "learn")
        methods[name] = MethodConfig(label=f"trial {trial.id}, learnt here", set=values, against=("defaults",))
        for how in config.transfer if trial.id in dwms else ():
            own = {**values, **_given(how, dwms[trial.id])}
            label = f"trial {trial.id}, {_LABELS[how]}"
            methods[_method(trial.id, how)] = MethodConfig(label=label, set=own, against=(name,))
    return ExperimentConfig(
        name=f"scale-{scale}",
        storage=str(config.folder),
        config=(*config.config, *here.config),
        set={**config.set, **here.set},
        sizes={scale: SizeConfig()},
        methods=methods,
        seeds=config.seeds,
        baseline="uniform",
        measure=config.measure,
        nulls=False,  # the uniform control is what a sweep is held against
        overrides=config.overrides,
    )


def _method(trial: str, how: str) -> str:
    return f"trial-{trial}" if how == "learn" else f"trial-{trial}-{how}"


def _given(how: str, folder: Path) -> dict[str, str]:
    if how == "replay":
        return {"dwm.mode": "replay", "dwm.trajectory": str(folder)}
    return {"dwm.mode": how, "dwm.init_from": str(newest_dwm(folder))}


def rows_of(config: TuneConfig, experiment: ExperimentConfig, chosen: Sequence[Trial]) -> list[Row]:
    """What the experiment of a scale has found, best first; settings without a finished run are left out."""
    (scale,), grid, found = experiment.sizes, read_grid(experiment.folder), []
    names: list[tuple[str, str, Any]] = [("uniform", "uniform", "uniform"), ("defaults", "defaults", "learn")]
    names += [(_method(t.id, how), t.id, how) for t in chosen for how in ("learn", *config.transfer)]
    for method, trial, how in names:
        outcomes = list(grid.of(scale, method).values())
        if outcomes:
            loss = fmean(outcome.finals[config.measure] for outcome in outcomes)
            cost = fmean(outcome.overhead for outcome in outcomes)
            found.append(Row(trial=trial, how=how, loss=loss, overhead=cost, seeds=len(outcomes)))
    return sorted(found, key=lambda row: (row.loss, row.overhead))


def dwms_at(experiment: ExperimentConfig, chosen: Sequence[Trial]) -> Dwms:
    """What the settings have learnt at a later scale, by the first seed."""
    (scale,), seed = experiment.sizes, experiment.seeds[0]
    folders = {t.id: experiment.folder / scale / _method(t.id, "learn") / f"seed-{seed}" / "dwm" for t in chosen}
    return _learnt(folders)


def config_of(config: TuneConfig, scale: str, row: Row, trials: Sequence[Trial], dwms: Dwms) -> RunConfig:
    """A row of a scale as a configuration that trains by itself, under the sweep's name."""
    values: dict[str, Any] = {}
    if row.how == "uniform":
        values = dict(UNIFORM)
    elif row.trial != "defaults":
        values = dict(next(trial.values for trial in trials if trial.id == row.trial))
    if row.how in _LABELS:
        values |= _given(row.how, dwms[row.trial])
    own = {"name": f"{config.name}-recommended", "storage": config.storage, "tracking.group": ""}
    return with_values(scale_config(config, scale), {**values, **own})
