"""The upper level's learner: alignments in, a new DWM version out. A plain class; an actor may wrap it.

`update` is a pure function of (state, feedback): whoever holds the last state can redo any update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ray_dwm.config import BilevelConfig, DwmConfig
from ray_dwm.core.weighting import (
    effective_sample_size,
    kl_to_uniform,
    standardise,
    upper_objective,
    weights_from_scores,
    whole_batch,
)
from ray_dwm.errors import NotFinite
from ray_dwm.models.dwm import DwmShape, build_dwm

State = dict[str, Tensor]
"""A learner's state as flat tensors: `phi.*`, `exp_avg.*`, `exp_avg_sq.*`, `counters` and the last update's `metrics`.

It is at once what a version publishes, what a checkpoint keeps and what a restarted actor is given back.
"""

METRICS = ("hypergrad_norm", "kl", "update_ess", "alignment_scale")
"""Figures of an update: |dJ/dphi| before clipping, KL of the weights in nats, their ESS in sequences, the alignments'
running standard deviation in nats."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a bi-level step of the LM tells the upper level: over the global batch, on the CPU."""

    version: int
    """The DWM version that this feedback makes."""
    input_ids: Tensor
    """(B, T)"""
    alignments: Tensor
    """(C,): a_i = dL_target/dw_i of the contracted sequences."""
    positions: Tensor
    """(C,): their places in the batch."""
    statistics: Tensor | None
    """(B, S) or None."""


class DwmLearner:
    """Holds the DWM, its AdamW state and the alignments' running scale."""

    def __init__(self, shape: DwmShape, dwm: DwmConfig, bilevel: BilevelConfig, seed: int) -> None:
        self._dwm, self._bilevel = dwm, bilevel
        self.model = build_dwm(shape, seed)
        self.version = 0
        self._running_variance = 0.0
        self._metrics = [0.0] * len(METRICS)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": dwm.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=dwm.lr,
            betas=(0.9, 0.95),
        )

    def update(self, feedback: Feedback) -> State:
        """One bi-level update: scores, weights, dJ/dphi by the chain rule, AdamW step.

        Raises:
            NotFinite: where the hypergradient is not finite; the DWM has not moved.
        """
        assert feedback.version == self.version + 1, "feedback must come in order"
        standard_C, self._running_variance = standardise(
            feedback.alignments, self._running_variance, self._bilevel.scale_decay
        )
        alignments_B = whole_batch(standard_C, feedback.positions, len(feedback.input_ids))
        for _ in range(self._bilevel.updates):
            scores_B = self.model(feedback.input_ids, feedback.statistics)
            weights_B = weights_from_scores(scores_B, self._dwm.temperature, self._dwm.floor)
            self._optimizer.zero_grad()
            upper_objective(weights_B, alignments_B, self._bilevel.kl).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._dwm.clip_norm or math.inf)
            weights_B = weights_B.detach()
            self._metrics = [
                float(norm),
                float(kl_to_uniform(weights_B)),
                float(effective_sample_size(weights_B)),
                self._running_variance**0.5,
            ]
            if not all(math.isfinite(value) for value in self._metrics):
                raise NotFinite(
                    f"the hypergradient of DWM version {feedback.version} is not finite: lower dwm.lr or raise "
                    "dwm.temperature; the last checkpoint is intact"
                )
            self._optimizer.step()
        self.version += 1
        return self.state()

    def state(self) -> State:
        """A copy of the whole state."""
        state: State = {f"phi.{name}": p.detach().clone() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            slots = self._optimizer.state.get(p, {})
            for slot in ("exp_avg", "exp_avg_sq"):
                state[f"{slot}.{name}"] = slots[slot].clone() if slots else torch.zeros_like(p)
        steps = self.version * self._bilevel.updates
        state["counters"] = torch.tensor([self.version, steps, self._running_variance], dtype=torch.float64)
        state["metrics"] = torch.tensor(self._metrics, dtype=torch.float64)
        return state

    def load_state(self, state: State) -> None:
        """Take over a state."""
        version, steps, variance = state["counters"].tolist()
        self.version, self._running_variance = int(version), variance
        self._metrics = state["metrics"].tolist()
        for name, p in self.model.named_parameters():
            p.data.copy_(state[f"phi.{name}"])
            if steps:
                self._optimizer.state[p] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": state[f"exp_avg.{name}"].clone(),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].clone(),
                }
            else:
                self._optimizer.state.pop(p, None)


class WeightService(Protocol):
    """What the training loop needs of the upper level. All ranks call all methods, in the same order."""

    def restore(self, state: State) -> None:
        """Roll back to a state; feedback of an earlier life is forgotten."""
        ...

    def submit(self, feedback: Feedback) -> None:
        """Hand over feedback; returns at once."""
        ...

    def fetch(self, version: int) -> State:
        """The state of a version that was submitted; waits until it is there."""
        ...


class LocalWeightService:
    """The learner in this process: every rank computes the same update. For torchrun, tests and benchmarks."""

    def __init__(self, learner: DwmLearner) -> None:
        self._learner = learner
        self._done: dict[int, State] = {}

    def restore(self, state: State) -> None:
        """See WeightService."""
        self._learner.load_state(state)
        self._done.clear()

    def submit(self, feedback: Feedback) -> None:
        """See WeightService."""
        self._done[feedback.version] = self._learner.update(feedback)

    def fetch(self, version: int) -> State:
        """See WeightService."""
        return self._done.pop(version)
