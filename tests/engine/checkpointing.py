"""Checkpoints of tiny runs, for tests."""

from __future__ import annotations

from ray_dwm.config import RunConfig
from ray_dwm.data.plan import Cursor
from ray_dwm.engine.checkpoint import Checkpointer
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build
from ray_dwm.engine.state import TrainingState

OPTIONS = ("bilevel.warmup_steps=50", "train.steps=60")


def checkpointer(config: RunConfig, parts: Parts | None = None) -> Checkpointer:
    parts = parts or build(config)
    return Checkpointer(config, TrainingState(parts.lower, parts.weighting), parts.identity, parts.mesh)


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())


def save(subject: Checkpointer, *steps: int) -> None:
    for step in steps:
        subject.save(step, Cursor(step + 10))
        subject.wait()
