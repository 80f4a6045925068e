"""Keeps the DWM's overhead within `bilevel.max_overhead` by choosing N and the target batch from measured times.

Only where `bilevel.every` is 0: a run with a fixed N is a deterministic function of its configuration, a run whose N
comes from clocks is not. The choice is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean, median

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.budget import USUAL_EVERY, Choice, Costs, choose
from ray_dwm.core.schedules import EveryN, Segment
from ray_dwm.engine.clock import EXTRA
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
        self._unit = 1 + len(config.data.more_targets)
        self._schedule = schedule
        self.target_batch = self._most
        self._reuse, self._audits = config.bilevel.reuse, config.bilevel.fidelity_every
        self._chosen = False
        self._audit_s = 0.0
        """Of the last check of the fidelity."""
        self._forget()

    def _forget(self) -> None:
        self._seen, self._wait = 0, 0.0
        self._plain: list[float] = []
        self._weigh: list[float] = []
        self._fixed: list[float] = []
        self._per_target: list[float] = []

    def observe(self, step: int, seconds: Mapping[str, float], parts: Mapping[str, float] | None) -> Choice | None:
        """Take the seconds of LM step `step`; returns the choice where one was made after it.

        Args:
            seconds: by phase.
            parts: of its bi-level step, if it was one.
        """
        self._wait += seconds["dwm_wait"]
        if parts is None:
            self._plain.append(sum(value for name, value in seconds.items() if name not in EXTRA))
            self._weigh.append(seconds["weigh"])
            return None
        wait, self._wait = self._wait, 0.0
        self._audit_s = parts["fidelity"] or self._audit_s
        self._seen += 1
        if self._seen == 1 and not self._chosen:
            return None  # kernels and buffers were made in it
        if parts["target_gradient"]:
            self._per_target.append(parts["target_gradient"] / self.target_batch)
        # All of the phase, and what waiting for its version took in the steps since the last.
        self._fixed.append(seconds["bilevel"] - parts["target_gradient"] - parts["fidelity"] + wait)
        due = REVIEW if self._chosen else CALIBRATION
        ready = self._per_target and self._plain
        return self._choose(step) if self._seen >= due and ready else None

    def _choose(self, step: int) -> Choice | None:
        costs = self._agreed()
        self._forget()
        every = self._schedule.segments[-1].every
        held = costs.overhead(every, self.target_batch)
        choice = choose(costs, self._limit, self._most, self._unit)
        if self._chosen:
            # By at most twice at a time: one odd measurement must not silence the upper level for long.
            choice = replace(choice, every=min(max(choice.every, -(-every // 2)), 2 * every))
            choice = replace(choice, overhead=costs.overhead(choice.every, choice.target_batch))
        keeps = 0.5 * self._limit <= held <= (1 + SLACK) * self._limit
        if self._chosen and (keeps or (every, self.target_batch) == (choice.every, choice.target_batch)):
            return None
        self._chosen, self.target_batch = True, choice.target_batch
        self._schedule.change(step, choice.every)
        return choice

    def _agreed(self) -> Costs:
        """Rank 0's measurements. Means for what comes in bursts, medians for what every step takes."""
        audit = self._audit_s / self._audits if self._audits else 0.0
        own = [
            median(self._plain),
            median(self._weigh),
            mean(self._fixed) + audit,
            median(self._per_target) / self._reuse,
        ]
        mine = torch.tensor(own, dtype=torch.float64, device=device())
        plain, always, fixed, per_target = all_sum(mine if is_main() else torch.zeros_like(mine)).tolist()
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
        chosen, batch = state["chosen"].tolist()
        self._chosen, self.target_batch = bool(chosen), batch


def first_every(config: RunConfig) -> int:
    """N until a budget has chosen one."""
    return config.bilevel.every or USUAL_EVERY
