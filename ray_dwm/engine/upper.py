"""The upper level as the loop sees it: when it is visited, on which target batch, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.schedules import EveryN
from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import Batch, draw
from ray_dwm.engine.bilevel import BilevelStep, Outcome
from ray_dwm.engine.budget import Budget
from ray_dwm.engine.evaluate import spread_rows
from ray_dwm.engine.mesh import is_main
from ray_dwm.engine.messages import say
from ray_dwm.engine.step import LowerLevel, StepResult
from ray_dwm.engine.weigher import Weigher


class UpperLevel:
    """Takes the bi-level steps of a run and sends what they find to the DWM."""

    def __init__(
        self,
        config: RunConfig,
        lower: LowerLevel,
        weigher: Weigher,
        targets: dict[str, ShardReader],
        seq_len: int,
        device: torch.device,
    ) -> None:
        self._config, self._lower, self._weigher = config, lower, weigher
        self._targets, self._seq_len, self._device = targets, seq_len, device
        self._step = BilevelStep(lower, config.bilevel)
        self._schedule = weigher.schedule
        self._budget: Budget | None = None
        if config.bilevel.every == 0 and isinstance(self._schedule, EveryN):
            self._budget = Budget(config, self._schedule)
        self._held: list[Tensor] = []
        self._outcome: Outcome | None = None

    def due(self, step: int) -> bool:
        """Whether LM step `step` is also a bi-level step."""
        return self._schedule.is_bilevel(step)

    @property
    def watch_seconds(self) -> float:
        """Seconds that the estimator took inside the LM's step."""
        return self._step.watch_seconds

    def begin(self, step: int, batch: Batch) -> None:
        """Before the LM's step."""
        update = self._schedule.updates_before(step)
        if self._schedule.holds(step):
            self._held = self._lower.everything()
        self._step.begin(step, update, batch, self._draw(update))

    def finish(self, step: int, batch: Batch, result: StepResult) -> None:
        """After the LM's step, whose gradients are consumed; a held LM is put back."""
        found = self._step.finish(batch, result)
        self._weigher.submit(step, batch.input_ids, found.alignments_C, found.positions_C, result.statistics_bS)
        self._outcome = found
        if self._held:
            self._lower.restore(self._held)
            self._held = []

    def _draw(self, update: int) -> dict[str, Batch]:
        """This rank's share of a fresh target batch of every target set."""
        whole = self._budget.target_batch if self._budget else self._config.bilevel.target_batch
        size, seed = whole // len(self._targets), self._config.seed
        few = self._config.bilevel.target_sequences
        return {
            name: draw(
                reader,
                size,
                update,
                seed + number,
                self._seq_len,
                self._device,
                among=spread_rows(reader, few) if few else None,
            )
            for number, (name, reader) in enumerate(self._targets.items())
        }

    def figures(self, step: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """What the last LM step `step` (from 0) adds to its line of metrics.jsonl, given its seconds by phase."""
        outcome, self._outcome = self._outcome, None
        figures = {}
        if outcome is not None:
            figures = {f"bilevel_seconds/{name}": value for name, value in self._step.seconds.items()}
            figures |= outcome.figures
            self._warn(step, outcome)
        if self._budget is not None:
            figures |= self._spend(self._budget, step, seconds, bilevel=outcome is not None)
        return figures

    def _warn(self, step: int, outcome: Outcome) -> None:
        fidelity, least = outcome.figures.get("dwm/fidelity", 1.0), self._config.bilevel.min_fidelity
        if not fidelity >= least and is_main():
            say(
                self._config.run_dir,
                f"warning: at step {step + 1} the alignments' fidelity is {fidelity:.3f}, below bilevel.min_fidelity = "
                f"{least:g}: raise bilevel.rank, or use bilevel.estimator=central",
            )

    def _spend(self, budget: Budget, step: int, seconds: Mapping[str, float], bilevel: bool) -> dict[str, float]:
        choice = budget.observe(step, seconds, self._step.seconds if bilevel else None)
        if choice is None:
            return {}
        if is_main():
            limit = self._config.bilevel.max_overhead
            verdict = "" if choice.overhead <= limit else ": the DWM's forward alone exceeds it, use a smaller dwm.size"
            say(
                self._config.run_dir,
                f"step {step + 1}: a bi-level step every {choice.every} steps, target batch {choice.target_batch}: "
                f"overhead {choice.overhead:.1%} of at most {limit:.1%}{verdict}",
            )
        return {"bilevel/every": choice.every, "bilevel/target_batch": choice.target_batch}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        budget = self._budget.state_dict() if self._budget else {}
        return {**self._step.target.state_dict(list(self._targets)), **{f"budget.{k}": v for k, v in budget.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        budget = {k.removeprefix("budget."): v for k, v in state.items() if k.startswith("budget.")}
        if self._budget is not None:
            self._budget.load_state_dict(budget)
        own = {k: v for k, v in state.items() if not k.startswith("budget.")}
        self._step.target.load_state_dict(list(self._targets), own)
