"""Checkpoints by their names: what is found in a run folder without loading any."""

from __future__ import annotations

from pathlib import Path

CONTENTS = ".metadata"
"""A checkpoint's table of contents (DCP's); where it is missing there is no checkpoint."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{CONTENTS}") if not path.parent.suffix)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_step(run_dir: Path) -> int | None:
    """Steps of the newest whole checkpoint of a run; None where there is none."""
    found = list_checkpoints(run_dir / "checkpoints")
    return step_of(found[-1]) if found else None
