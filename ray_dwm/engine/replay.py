"""A DWM that is given, not learnt: one version throughout, or the trajectory that another run has left.

Versions follow the fraction of training, so a trajectory of a short run fits a long one. No actor and no target
gradient: the DWM's forward is all it costs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_json, write_whole
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.controls import dwm_weights
from ray_dwm.engine.weigher import batch_scores
from ray_dwm.engine.weighting import Stateless, Statistics
from ray_dwm.errors import DataError
from ray_dwm.models.dwm import DataWeightingModel
from ray_dwm.models.folders import load_dwm

TRAJECTORY = "trajectory.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A version and the fraction of training from which on it was in force."""

    fraction: float
    folder: Path


def write_trajectory(folder: Path, newest: int, total_steps: int) -> None:
    """Index the DWM versions in a folder by the fraction of training from which on they were applied.

    What was applied first after LM step `newest` is of an earlier life of the run, and goes.
    """
    versions = []
    for config in sorted(folder.glob("v*/config.json")):
        step = read_json(config)["learnt_on"]["step"]
        if step > newest:
            shutil.rmtree(config.parent)
            continue
        versions.append({"fraction": step / total_steps, "folder": config.parent.name})
    write_whole(folder / TRAJECTORY, json.dumps({"versions": versions}, indent=2) + "\n")


def read_trajectory(folder: Path) -> list[Entry]:
    """The versions of a trajectory, oldest first.

    Raises:
        DataError: missing, damaged or empty.
    """
    path = folder / TRAJECTORY
    if not path.is_file():
        raise DataError(f"{path} does not exist: dwm.trajectory is the dwm folder of a run that learnt a DWM")
    try:
        versions = read_json(path)["versions"]
        entries = [Entry(float(v["fraction"]), folder / str(v["folder"])) for v in versions]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): let the run that made it end again") from None
    if not entries:
        raise DataError(f"{path} names no version: the run that made it ended before the first point of its trajectory")
    return sorted(entries, key=lambda entry: entry.fraction)


class ReplayedWeighting(Stateless):
    """Applies given DWM versions."""

    def __init__(self, config: RunConfig, tokenizer_sha256: str, device: torch.device) -> None:
        self._config, self._sha256, self._device = config, tokenizer_sha256, device
        if config.dwm.mode == "replay":
            self._entries = read_trajectory(Path(config.dwm.trajectory).expanduser())
        else:
            self._entries = [Entry(0.0, Path(config.dwm.init_from).expanduser())]
        self._step, self._index = 0, -1
        for index in reversed(range(len(self._entries))):  # all of them: one that does not fit is refused now
            self._model = self._load(index)

    def _load(self, index: int) -> DataWeightingModel:
        model, _ = load_dwm(self._entries[index].folder, self._sha256)
        return model.to(self._device).eval()

    @property
    def statistics(self) -> Statistics:
        """See Weighting."""
        return "loss_and_entropy" if self._model.shape.lm_features else "none"

    def advance(self, step: int) -> None:
        """See Weighting. Before the first version's fraction the weights are uniform."""
        self._step, fraction = step, step / self._config.train.steps
        index = sum(entry.fraction <= fraction for entry in self._entries) - 1
        if index != self._index and index >= 0:
            self._model = self._load(index)
        self._index = index

    @torch.no_grad()
    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        scores_B = batch_scores(self._model, batch.input_ids, statistics_bS, self._config.train.global_batch)
        if self._index < 0:
            scores_B = torch.zeros_like(scores_B)
        return scores_B, dwm_weights(self._config, scores_B, self._step)

    @property
    def metrics(self) -> dict[str, float]:
        """See Weighting: which of the given versions is applied, from 1; 0 before the first."""
        return {"dwm/version": self._index + 1}
