"""What a run is put together from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ray_dwm.config import RunConfig
from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import BatchSource
from ray_dwm.engine.metrics import MetricSink
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.engine.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts; `setup.build` makes them."""

    config: RunConfig
    device: torch.device
    seq_len: int
    lower: LowerLevel
    source: BatchSource
    targets: dict[str, ShardReader]
    """Name of a target set -> its shards."""
    evaluation: dict[str, ShardReader]
    """Name of an evaluation set -> its shards."""
    domains: list[str]
    flops_per_token: int
    """Of the model, forward and backward."""
    weighting: Weighting | None
    """None: uniform weights."""
    identity: Mapping[str, Any]
    """What a checkpoint must be of to be continued; see `engine/identity.py`."""
    mesh: Mapping[str, int]
    """Name of every dimension of the mesh -> its size."""
    sinks: list[MetricSink] = field(default_factory=list)
    """Besides metrics.jsonl; used on rank 0."""
    on_checkpoint: Callable[[int, Path, dict[str, float]], None] | None = None
    """Called on all ranks when a checkpoint is whole: (step, folder, the step's figures)."""
    on_version: Callable[[int], None] | None = None
    """Called on all ranks at the points of the trajectory, after so many steps."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked before the first step and after each on every rank: where one says yes, all end, as after a SIGTERM."""
    preempted: Callable[[], bool] | None = None
    """Asked from time to time on all ranks together, which get the same answer: yes saves a checkpoint at once."""
    until: int = 0
    """Steps after which the loop ends with a checkpoint, from which another one goes on; 0: train.steps."""
    figures: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Step -> what its line of metrics.jsonl says besides."""

    @property
    def weigher(self) -> Weigher | None:
        """The weighting where it is a DWM."""
        return self.weighting if isinstance(self.weighting, Weigher) else None
