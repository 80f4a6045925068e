"""Keeps the DWM's overhead within `bilevel.max_overhead` by choosing N and the target batch from measured times.

Only where `bilevel.every` is 0: a run with a fixed N is a deterministic function of its configuration, a run whose N
comes from clocks is not. The choice is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.budget import USUAL_EVERY, Choice, Costs, choose
from ray_dwm.core.schedules import EveryN, Segment
from ray_dwm.engine.mesh import all_sum, device, is_main

CALIBRATION = 3
"""Bi-level steps, `USUAL_EVERY` apart, before the first choice; the first of them is not measured."""
REVIEW = 10
"""Bi-level steps between two looks at whether the choice still holds."""
SLACK = 0.1
"""A choice is changed where the overhead would leave the budget by this part of it, or stay under half of it."""


class Budget:
    """Measures, chooses, and changes the schedule; all ranks follow rank 0's clock."""

    def __init__(self, config: RunConfig, schedule: EveryN) -> None:
        self._limit, self._most = config.bilevel.max_overhead, config.bilevel.target_batch
        self._unit = config.cluster.workers * (1 + len(config.data.more_targets))
        self._schedule = schedule
        self.target_batch = self._most
        self._seen, self._chosen = 0, False
        self._plain: list[float] = []
        self._always: list[float] = []
        self._fixed: list[float] = []
        self._per_target: list[float] = []

    def observe(self, step: int, plain: float, always: float, bilevel: Mapping[str, float] | None) -> Choice | None:
        """Take a step's seconds; returns the choice where one was made after it.

        Args:
            plain: seconds of LM step `step` without what the DWM adds.
            always: what the DWM adds to every step.
            bilevel: parts of its bi-level step, if it was one.
        """
        if step == 0:
            return None
        self._plain.append(plain)
        self._always.append(always)
        if bilevel is None:
            return None
        self._seen += 1
        if self._seen == 1:
            return None  # kernels and buffers were made in it
        if bilevel["target_gradient"]:
            self._per_target.append(bilevel["target_gradient"] / self.target_batch)
        self._fixed.append(sum(v for k, v in bilevel.items() if k not in ("target_gradient", "fidelity")))
        due = REVIEW if self._chosen else CALIBRATION
        return self._choose(step) if self._seen >= due and self._per_target else None

    def _choose(self, step: int) -> Choice | None:
        costs = self._agreed()
        self._seen = 1
        for values in (self._plain, self._always, self._fixed, self._per_target):
            values.clear()
        every = self._schedule.segments[-1].every
        held = costs.overhead(every, self.target_batch)
        choice = choose(costs, self._limit, self._most, self._unit)
        keeps = 0.5 * self._limit <= held <= (1 + SLACK) * self._limit or (every, self.target_batch) == (
            choice.every,
            choice.target_batch,
        )
        if self._chosen and keeps:
            return None
        self._chosen, self.target_batch = True, choice.target_batch
        self._schedule.change(step, choice.every)
        return choice

    def _agreed(self) -> Costs:
        lists = (self._plain, self._always, self._fixed, self._per_target)
        mine = torch.tensor([median(x) if is_main() else 0.0 for x in lists], dtype=torch.float64, device=device())
        plain, always, fixed, per_target = all_sum(mine).tolist()
        return Costs(plain=plain, always=always, fixed=fixed, target_sequence=per_target)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        segments = [[s.start, s.every, s.before] for s in self._schedule.segments]
        padded = [segments[0]] * (EveryN.KEPT - len(segments)) + segments
        return {"segments": torch.tensor(padded), "chosen": torch.tensor([int(self._chosen), self.target_batch])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        rows = state["segments"].tolist()
        self._schedule.segments = [Segment(start=a, every=n, before=b) for a, n, b in rows]
        chosen, self.target_batch = state["chosen"].tolist()
        self._chosen, self._seen = bool(chosen), 0


def first_every(config: RunConfig) -> int:
    """N until a budget has chosen one."""
    return config.bilevel.every or USUAL_EVERY
