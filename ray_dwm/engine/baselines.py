"""Online baselines in the DWM's place: weights from the LM alone, by the pure functions of core/reweighting.py.

Legend: B = sequences of the global batch, b = this rank's, D = the LM's width. Scores are log(B w): 0 is uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.reweighting import anchor_alignment, annealed_r, joint_update_aware_weights, loss_based_weights
from ray_dwm.core.weighting import log_relative
from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import Batch, draw
from ray_dwm.engine.learner import State
from ray_dwm.engine.mesh import all_gather_rows
from ray_dwm.engine.step import losses_and_statistics
from ray_dwm.engine.weighting import Stateless, Statistics
from ray_dwm.models.lm import Lm


class LossWeighting(Stateless):
    """A function of the sequences' current losses (Sow et al., ICLR 2025).

    A sequence without counted tokens has no loss: it keeps the uniform weight and takes no part in the batch's range.
    """

    statistics: Statistics = "loss"

    def __init__(self, config: RunConfig) -> None:
        self._config, self._size = config.weighting, config.train.global_batch
        self._step = 0

    def advance(self, step: int) -> None:
        """See Weighting."""
        self._step = step

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        del batch
        assert statistics_bS is not None
        c = self._config
        r = annealed_r(self._step, warmup_steps=c.r_warmup_steps, r_final=c.r, anneal_steps=c.r_anneal_steps)
        losses_B = all_gather_rows(statistics_bS)[: self._size].squeeze(1)
        counted_B = losses_B != 0
        weights_B = torch.full_like(losses_B, 1.0 / len(losses_B))
        if bool(counted_B.any()):
            share = counted_B.sum() / len(losses_B)
            weights_B[counted_B] = share * loss_based_weights(losses_B[counted_B], c.strategy, r)
        return log_relative(weights_B), weights_B


class JointUpdateAwareWeighting(Stateless):
    """Likeness to the target set's mean embedding, less redundancy within the batch (DataFlex)."""

    statistics: Statistics = "embedding"

    def __init__(self, config: RunConfig, model: Lm, target: ShardReader, seq_len: int, device: torch.device) -> None:
        self._config, self._model, self._target = config, model, target
        self._seq_len, self._device = seq_len, device
        self._anchor_D = torch.zeros(model.config.hidden_size, device=device)

    def advance(self, step: int) -> None:
        """See Weighting; at every `anchor_every`-th step the anchor is taken anew, from the LM as it is now."""
        if step % self._config.weighting.anchor_every == 0:
            self._anchor_D = self._anchor(step // self._config.weighting.anchor_every)

    @torch.no_grad()
    def _anchor(self, refresh: int) -> Tensor:
        """Mean embedding of fresh target sequences, (D,)."""
        size = self._config.weighting.anchor_sequences
        batch = draw(self._target, size, refresh, self._config.seed, self._seq_len, self._device)
        parts = batch.micro_batches(self._config.train.micro_batch)
        embeddings = [losses_and_statistics(self._model, part, 1.0, self.statistics)[1] for part in parts]
        return all_gather_rows(torch.cat([x for x in embeddings if x is not None]))[:size].mean(dim=0)

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        del batch
        assert statistics_bS is not None
        c, size = self._config.weighting, self._config.train.global_batch
        alignment_B, gram_BB = anchor_alignment(all_gather_rows(statistics_bS)[:size], self._anchor_D)
        weights_B = joint_update_aware_weights(alignment_B, gram_BB, c.beta, c.tau)
        return log_relative(weights_B), weights_B

    def state_dict(self, step: int) -> State:
        """See Weighting."""
        del step
        return {"anchor": self._anchor_D.clone()}

    def load_state_dict(self, step: int, state: State) -> None:
        """See Weighting."""
        del step
        self._anchor_D = state["anchor"]
