"""Pure functions of the step: learning rate, bi-level steps, DWM version."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
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


class BilevelSchedule(ABC):
    """When the upper level is visited, and which DWM version weighs which step. All steps count from 0.

    A bi-level step at LM step s makes one DWM version. It is applied from LM step s + 1 + delay on, so the
    actor has `delay` steps of time to compute it beside training and the run stays deterministic.
    """

    delay_steps: int

    @abstractmethod
    def updates_before(self, step: int) -> int:
        """Number of bi-level steps among the LM steps 0 .. step-1."""

    @property
    @abstractmethod
    def closest(self) -> int:
        """The fewest LM steps between two bi-level steps."""

    def is_bilevel(self, step: int) -> bool:
        """Whether LM step `step` is also a bi-level step."""
        return self.updates_before(step + 1) > self.updates_before(step)

    def version(self, step: int) -> int:
        """The DWM version whose weights LM step `step` uses; 0 is the start."""
        return self.updates_before(step - self.delay_steps)

    def staleness(self, step: int) -> int:
        """LM steps from the bi-level step that made the version of LM step `step` to that step; for version 0, `step`.

        At least 1 + delay otherwise.
        """
        made = bisect_left(range(step + 1), self.version(step), key=self.updates_before)
        return step - max(made - 1, 0)

    def holds(self, step: int) -> bool:
        """Whether the LM is put back after LM step `step`, which then only taught the DWM."""
        del step
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A bi-level step at `start` and at every `every`-th step after it, `before` of them earlier."""

    start: int
    every: int
    before: int = 0

    def updates_before(self, step: int) -> int:
        """See BilevelSchedule; where `step` is not before the segment."""
        return self.before + (0 if step <= self.start else (step - 1 - self.start) // self.every + 1)


class EveryN(BilevelSchedule):
    """Every N-th step from the warm-up on; a budget may change N on the way."""

    KEPT = 4
    """Segments that are remembered: enough to look back over the delay."""

    def __init__(self, *, every: int, warmup_steps: int, delay_steps: int, changing: bool = False) -> None:
        self.delay_steps = delay_steps
        self.segments = [Segment(start=warmup_steps, every=every)]
        self._closest = 1 if changing else every

    @property
    def closest(self) -> int:
        """See BilevelSchedule."""
        return self._closest

    def updates_before(self, step: int) -> int:
        """See BilevelSchedule."""
        segment = next((s for s in reversed(self.segments) if step > s.start), self.segments[0])
        return segment.updates_before(step)

    def change(self, last: int, every: int) -> None:
        """After the bi-level step `last`, which was the newest, the next ones follow every `every` steps."""
        segment = Segment(start=last, every=every, before=self.updates_before(last))
        self.segments = [*self.segments, segment][-self.KEPT :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged(BilevelSchedule):
    """Stages of equal length after the warm-up: K bi-level steps in a row, then the DWM stays as it is.

    With `hold`, the LM is put back after each of the K steps, so that the DWM is learnt on one LM.
    """

    stages: int
    updates: int
    total_steps: int
    warmup_steps: int
    delay_steps: int
    hold: bool = False

    @property
    def closest(self) -> int:
        """See BilevelSchedule."""
        return 1

    def start(self, stage: int) -> int:
        """First LM step of a stage."""
        return self.warmup_steps + stage * (self.total_steps - self.warmup_steps) // self.stages

    def stage(self, step: int) -> int:
        """Stages that have begun before or at LM step `step`; 0 in the warm-up."""
        return sum(self.start(stage) <= step for stage in range(self.stages))

    def updates_before(self, step: int) -> int:
        """See BilevelSchedule."""
        return sum(min(max(step - self.start(stage), 0), self.updates) for stage in range(self.stages))

    def holds(self, step: int) -> bool:
        """See BilevelSchedule."""
        return self.hold and self.is_bilevel(step)
