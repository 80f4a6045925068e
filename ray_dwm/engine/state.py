"""The training state of a run, as a checkpoint holds it.

No generator's state is in it: all chance is a pure function of the seed and the step. Nor is anything of one rank only,
so that another number of workers can continue.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ray_dwm.data.plan import Cursor
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.engine.weighting import Weighting


class TrainingState:
    """LM, optimizer, step, data cursor, and the state of the weighting (a DWM's optimizer too) and the upper level."""

    def __init__(self, lower: LowerLevel, weighting: Weighting | None, upper: UpperLevel | None = None) -> None:
        self.lower, self._weighting, self._upper = lower, weighting, upper

    def capture(self, step: int, cursor: Cursor) -> dict[str, Any]:
        """The state after `step` steps; its tensors are those in use, not copies."""
        model, optimizer = get_state_dict(self.lower.model, self.lower.optimizer)
        state: dict[str, Any] = {
            "lm": model,
            "optimizer": optimizer,
            "loop": {"step": torch.tensor(step), "cursor": torch.tensor(cursor.batches)},
        }
        if self._weighting is not None:
            state["weighting"] = self._weighting.state_dict(step)
        if self._upper is not None and (kept := self._upper.state_dict()):
            state["upper"] = kept
        return state

    def apply(self, state: dict[str, Any]) -> tuple[int, Cursor]:
        """Take over what `capture` gave: (completed steps, cursor)."""
        set_state_dict(
            self.lower.model,
            self.lower.optimizer,
            model_state_dict=state["lm"],
            optim_state_dict=state["optimizer"],
        )
        step = int(state["loop"]["step"])
        if self._upper is not None:  # first: it holds the calendar that says which DWM version is in force
            self._upper.load_state_dict(state.get("upper", {}))
        if self._weighting is not None:
            self._weighting.load_state_dict(step, state["weighting"])
        return step, Cursor(int(state["loop"]["cursor"]))
