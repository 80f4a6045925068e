"""Pure functions of the step: learning rate, bi-level steps, DWM version."""

from __future__ import annotations

import math
from dataclasses import dataclass


def lr_factor(
    step: int, *, total_steps: int, warmup_steps: int, schedule: str, min_ratio: float, decay_fraction: float
) -> float:
    """Learning rate at `step` (from 0) over its peak.

    Linear warm-up, then `constant`, `cosine` to `min_ratio`, or `wsd` (warm-up, stable, linear decay to
    `min_ratio` over the last `decay_fraction` of training; Hu et al. 2024, MiniCPM, section 4).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(total_steps * decay_fraction))
    progress = (step - (total_steps - decay_steps)) / decay_steps
    return 1.0 if progress <= 0 else 1 - (1 - min_ratio) * min(1.0, progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class BilevelSchedule:
    """When the upper level is visited, and which DWM version weighs which step.

    A bi-level step at LM step s makes one DWM version. It is applied from LM step s + 1 + delay on, so the
    actor has `delay` steps of time to compute it beside training and the run stays deterministic.
    """

    every: int
    warmup_steps: int
    delay_steps: int

    def is_bilevel(self, step: int) -> bool:
        """Whether LM step `step` (from 0) is also a bi-level step: every N-th, from the warm-up on."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.every == 0

    def updates_before(self, step: int) -> int:
        """Number of bi-level steps among the LM steps 0 .. step-1."""
        return 0 if step <= self.warmup_steps else (step - 1 - self.warmup_steps) // self.every + 1

    def version(self, step: int) -> int:
        """The DWM version whose weights LM step `step` uses; 0 is the uniform start."""
        return self.updates_before(step - self.delay_steps)
