"""What the step and the loop need of whatever weighs a global batch: the DWM or a baseline."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from ray_dwm.engine.batch import Batch
from ray_dwm.engine.learner import State

Statistics = Literal["none", "loss", "loss_and_entropy", "embedding", "tokens"]
"""What a weighting looks at besides the token ids: S numbers about each sequence, of the LM before its step. `loss` is
the mean over counted tokens in nats, S = 1; `loss_and_entropy` adds that of the predictive entropy, S = 2; `embedding`
is the last layer's hidden state of the last token, S = the LM's width; `tokens` is the loss of every prediction, those
that do not count too, S = T - 1."""


class Weighting(Protocol):
    """Weights for the GLOBAL batch, from every rank's share: neither world size nor accumulation may change them.

    Uniform weights have no Weighting. All ranks call all methods, in the same order.
    """

    @property
    def statistics(self) -> Statistics:
        """What `weigh` is to be given; anything but `none` costs a forward where micro-batches accumulate."""
        ...

    def advance(self, step: int) -> None:
        """Get ready for LM step `step` (from 0), before its forward."""
        ...

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scores, weights) of the global batch, both (B,), from this rank's share of it and its statistics.

        Once a step. Weights sum to 1. Scores are what they were made from, for the record.
        """
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of its own for metrics.jsonl, under their full names."""
        ...

    def state_dict(self, step: int) -> State:
        """State for a checkpoint after `step` LM steps; its keys and shapes are always the same."""
        ...

    def load_state_dict(self, step: int, state: State) -> None:
        """Continue after `step` LM steps."""
        ...


class Stateless:
    """What a Weighting has where nothing outlives a step."""

    @property
    def metrics(self) -> dict[str, float]:
        """See Weighting."""
        return {}

    def advance(self, step: int) -> None:
        """See Weighting."""

    def state_dict(self, step: int) -> State:
        """See Weighting."""
        del step
        return {}

    def load_state_dict(self, step: int, state: State) -> None:
        """See Weighting."""


class GivenWeights(Stateless):
    """Fixed weights of one global batch."""

    statistics: Statistics = "none"

    def __init__(self, weights_B: Tensor) -> None:
        self._weights_B = weights_B

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        return self._weights_B, self._weights_B
