"""How often the upper level is visited, and with how large a target batch, for a given overhead."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_TARGET_BATCH = 8
"""Below this the target gradient is mostly noise (benchmarks/bilevel.py, table `sampling`)."""
USUAL_EVERY = 5
"""A smaller target batch is preferred to rarer updates until this N is reached: on the quickstart, every 5th step with
8 targets did better than every 10th with 16, at the same cost (benchmarks/quickstart_search.py)."""
RAREST = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Measured seconds."""

    plain: float
    """Of a training step without everything that the DWM adds."""
    always: float
    """What the DWM adds to every step: its forward, and waiting for a version."""
    fixed: float
    """What a bi-level step adds, without the target gradient."""
    target_sequence: float
    """Target gradient, per target sequence."""

    def overhead(self, every: int, target_batch: int) -> float:
        """Added time over plain time."""
        return (self.always + (self.fixed + self.target_sequence * target_batch) / every) / self.plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a budget buys."""

    every: int
    target_batch: int
    overhead: float
    """As predicted."""


def choose(costs: Costs, max_overhead: float, most: int, unit: int) -> Choice:
    """The most frequent updates that the budget allows, with a target batch as near to `most` as that leaves room for.

    The target batch is halved, down to `LEAST_TARGET_BATCH`, while N would exceed `USUAL_EVERY`; after that N grows.

    Args:
        max_overhead: added time over plain time that may not be exceeded.
        most: the largest target batch.
        unit: what target batches must be a multiple of.

    Returns:
        The choice; its overhead exceeds the budget where `always` alone does.
    """
    batch, every = most, _every(costs, max_overhead, most)
    while every > USUAL_EVERY:
        smaller = batch // 2 // unit * unit
        if smaller < max(LEAST_TARGET_BATCH, unit):
            break
        batch, every = smaller, _every(costs, max_overhead, smaller)
    return Choice(every=every, target_batch=batch, overhead=costs.overhead(every, batch))


def _every(costs: Costs, max_overhead: float, target_batch: int) -> int:
    room = max_overhead * costs.plain - costs.always
    if room <= 0:
        return RAREST
    needed = (costs.fixed + costs.target_sequence * target_batch) / room
    return min(RAREST, max(1, math.ceil(needed - 1e-9)))
