"""What is checked before the first cell of an experiment starts: each of them, and that they can be compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_dwm.config import RunConfig
from ray_dwm.config.experiment import Cell, ExperimentConfig
from ray_dwm.data.manifest import MANIFEST, file_sha256, load_manifest
from ray_dwm.errors import ConfigError, DataError, UserError
from ray_dwm.models.presets import parameter_count
from ray_dwm.orchestration.cells import check_cell, configure, is_done, tokens
from ray_dwm.orchestration.cluster import connect, needed
from ray_dwm.orchestration.doctor_config import disk_needed
from ray_dwm.orchestration.prepare import prepare_sets, sets_to_make


def resources_of(run: RunConfig) -> Mapping[str, float]:
    """What a cell holds of the cluster."""
    return needed(run, run.cluster.most_workers)


def largest(runs: Sequence[RunConfig]) -> RunConfig:
    """The run for which a cluster of this machine must be large enough."""
    return max(runs, key=lambda run: resources_of(run)["CPU"])


def check(config: ExperimentConfig, cells: Sequence[Cell], at_once: int = 1) -> dict[Cell, RunConfig]:
    """Prepare data that are missing, then check cells and that they can be compared; no run is started.

    Args:
        cells: those that are to be run, and those that are done, with which they will be compared.
        at_once: how many are to run at the same time, where a cluster has to be started.

    Raises:
        UserError: naming the cell, key, file or folder, and the remedy.
    """
    runs = {cell: configure(config, cell) for cell in cells}
    for run in runs.values():
        if sets_to_make(run, missing_only=True):
            connect(largest(list(runs.values())), at_once)
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
    seen: dict[str, tuple[Cell, dict[str, object]]] = {}
    for cell, run in runs.items():
        digests = _set_digests(run)
        _check_measure(config.measure, cell, run, digests)
        _check_run(cell, run)
        everywhere = {"the tokenizer of data.train": _tokenizer(run), f"set {config.measure}": digests[config.measure]}
        for scope, figures in (("everywhere", everywhere), (f"size {cell.size}", _budget(run))):
            first, expected = seen.setdefault(scope, (cell, figures))
            for what, value in figures.items():
                if value != expected[what]:
                    raise ConfigError(
                        f"experiment {config.name}: {what} is {expected[what]} in {first.path} and {value} in "
                        f"{cell.path}: cells that are compared must have the same"
                    )


def _budget(run: RunConfig) -> dict[str, object]:
    t = run.train
    return {
        "the number of tokens": tokens(run),
        "lm.preset": run.lm.preset,
        "train.global_batch": t.global_batch,
        "train.eval_every": t.eval_every,
        "train.eval_sequences": t.eval_sequences,
    }


def _tokenizer(run: RunConfig) -> str:
    manifest = load_manifest(run.data.train)
    return f"{manifest.tokenizer_name} ({manifest.tokenizer_sha256[:8]})"


def _set_digests(run: RunConfig) -> dict[str, str]:
    sets = {"train": run.data.train, **run.data.evaluation_sets}
    return {name: file_sha256(Path(folder).expanduser() / MANIFEST) for name, folder in sets.items()}


def _check_measure(name: str, cell: Cell, run: RunConfig, digests: Mapping[str, str]) -> None:
    if name not in run.data.evaluation_sets:
        raise ConfigError(
            f"{cell.path}: measure is {name!r}, and there is no such evaluation set: they are "
            f"{', '.join(run.data.evaluation_sets)}"
        )
    learnt = ["train", *run.data.target_sets]
    if name not in learnt and any(digests[other] == digests[name] for other in learnt):
        raise DataError(f"{cell.path}: the held-out set {name}, by which the experiment decides, is also learnt from")


def refuse_mirror(run: RunConfig) -> None:
    """Cells and trials lie in folders of their own within the storage, whose names say nothing elsewhere.

    Raises:
        ConfigError: there is a mirror.
    """
    if run.mirror:
        raise ConfigError(
            f"mirror is {run.mirror}, but a mirror is of a single run: leave it out, and copy the experiment's folder"
        )


def _check_run(cell: Cell, run: RunConfig) -> None:
    refuse_mirror(run)
    every, steps = run.train.eval_every, run.train.steps
    if steps // every < 2:
        raise ConfigError(
            f"{cell.path}: train.eval_every is {every} with train.steps = {steps}: too few points for a curve, lower "
            "train.eval_every to at most half of the steps"
        )
    if cell.again and run.learns_dwm and run.bilevel.every == 0:
        raise ConfigError(f"repeat is {cell.method}, whose bilevel.every=0 lets clocks decide: no two runs are alike")


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
