"""Oracle influences: what a step of the current LM on one sequence alone does to its loss on the target sets.

Yu et al. 2024 (arXiv 2406.06046), section 3.2: the influence of sequence x on the LM theta is
I(x) = L_target(theta) - L_target(A(theta, x)), A being the optimizer's next step, here on x alone and with the moments,
clipping and learning rate that the LM has at that point of its training. Positive means that x helps. What the moments
alone would change is the same for every x.

Legend: n = probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dwm.config import BilevelConfig, RunConfig, load, to_dict
from ray_dwm.config import build as build_config
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.engine.batch import Batch, draw, to_batch
from ray_dwm.engine.checkpoint import Checkpointer
from ray_dwm.engine.identity import run_identity
from ray_dwm.engine.setup import build
from ray_dwm.engine.state import TrainingState
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.target import TargetGradient, Targets
from ray_dwm.errors import DataError


def influences(
    lower: LowerLevel, step: int, probes: Batch, targets: Targets, config: BilevelConfig
) -> NDArray[np.float64]:
    """Influence of every probe in nats a target token, (n,); NaN where none of its tokens counts.

    LM and optimizer are afterwards what they were before, bit by bit. One process, and a `lower` of train.global_batch
    = 1, whose step on one sequence is on the mean over its tokens.

    Args:
        step: the LM step (from 0) that comes next; it sets the learning rate.
        targets: the sequences whose loss counts, by set; bilevel.target_weights weighs the sets.

    Raises:
        TrainingError: a probe's gradient is not finite.
    """
    target = TargetGradient(lower, config)
    before, kept = target.loss(targets), lower.everything()
    rates = [group["lr"] for group in lower.optimizer.param_groups]
    found = np.full(len(probes), np.nan)
    for index in range(len(probes)):
        probe = probes.rows(torch.tensor([index], device=probes.input_ids.device))
        if not bool(probe.mask.any()):
            continue
        lower.step(step, probe, None)
        lower.zero_grad()
        found[index] = before - target.loss(targets)
        lower.restore(kept)
    for group, rate in zip(lower.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return found


class Prober:
    """The LM and the optimizer of a run's checkpoint in this process alone, whatever mesh has written them."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Load the checkpoint of `step` steps.

        Raises:
            ConfigError, DataError, TrainingError: the run folder, its data or the checkpoint cannot be read.
        """
        self._run = load([run_dir / "config.yaml"])
        parts = build(_alone(self._run))
        self._lower, self._seq_len, self._device = parts.lower, parts.seq_len, parts.device
        state = TrainingState(parts.lower, None)
        identity = run_identity(self._run, load_manifest(self._run.data.train))
        checkpointer = Checkpointer(self._run, state, identity, parts.mesh)
        checkpointer.load(checkpoint_path(run_dir, step))
        checkpointer.close()
        # At a run's end there is no next step: the last one's learning rate then.
        self._step = min(step, self._run.train.steps - 1)

    def influences(
        self,
        probes: Rows,
        targets: Mapping[str, str],
        sequences: int,
        seed: int,
        weights: Mapping[str, float] = MappingProxyType({}),
    ) -> NDArray[np.float64]:
        """See the function of this name.

        Args:
            targets: name -> shards of the target sets.
            sequences: of each set, drawn by `seed`; all where it has fewer.
            weights: of the sets, as bilevel.target_weights; the run's own are of other sets.
        """
        readers = {name: open_shards(folder) for name, folder in targets.items()}
        drawn = {
            name: draw(reader, min(sequences, reader.manifest.rows), self._step, seed, self._seq_len, self._device)
            for name, reader in readers.items()
        }
        batch = to_batch(probes, len(probes), self._seq_len, self._device)
        of_run = to_dict(self._run.bilevel)
        config: BilevelConfig = build_config(BilevelConfig, {**of_run, "target_weights": dict(weights)})
        return influences(self._lower, self._step, batch, drawn, config)


def _alone(run: RunConfig) -> RunConfig:
    """The same LM and optimizer in a process of its own, for steps on single sequences."""
    values = to_dict(run)
    values["data"] = {"train": run.data.train}
    values["train"] |= {"global_batch": 1, "profile": False}
    values["weighting"] = {"method": "uniform"}
    values["parallel"] |= {"shard": 0, "compile": False}
    values["cluster"] = {"workers": 1}
    alone: RunConfig = build_config(RunConfig, values)
    return alone


@lru_cache(maxsize=1)
def _opened(run_dir: str, step: int, written_ns: int) -> Prober:
    del written_ns  # a checkpoint that was written again is another one
    return Prober(Path(run_dir), step)


def open_prober(run_dir: Path, step: int) -> Prober:
    """The prober of a checkpoint, loaded once in this process; the one before it goes.

    Raises:
        DataError: the checkpoint is not there.
    """
    path = checkpoint_path(run_dir, step)
    try:
        written_ns = (path / ".metadata").stat().st_mtime_ns
    except OSError:
        raise DataError(f"checkpoint {path} is not there any more: start the same command again") from None
    return _opened(str(run_dir), step, written_ns)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step_{step:09d}"
