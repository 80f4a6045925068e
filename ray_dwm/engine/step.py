"""The lower level: one optimizer step on a weighted global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ray_dwm.config import TrainConfig
from ray_dwm.core.losses import sample_losses, sample_means
from ray_dwm.core.schedules import lr_factor
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.clock import Stopwatch
from ray_dwm.engine.mesh import Layout, all_sum, own_rows, shard
from ray_dwm.engine.weighting import Statistics, Weighting
from ray_dwm.errors import NotFinite, TrainingError
from ray_dwm.models.lm import Lm, LmOutput


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind; B = global batch, b = this rank's share."""

    losses_b: Tensor
    """l_i, detached, (b,)."""
    scores_B: Tensor | None
    weights_B: Tensor
    statistics_bS: Tensor | None
    """What the weighting looked at, (b, S)."""
    tokens_per_sample: float
    grad_norm: float
    """Before clipping."""
    lr: float
    times: Mapping[str, Stopwatch]
    """By part: `weigh`, with the forwards that only it needed, `forward`, `backward`, and `optimizer` with clipping."""


def build_optimizer(model: Lm, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as one kernel or SGD (for which DTensors have none) as few; weight decay on matrices only."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def tokens_per_sample(batch: Batch, global_batch: int) -> float:
    """Mean number of counted predictions per sample over the global batch.

    Raises:
        TrainingError: where none counts.
    """
    counted = int(all_sum(batch.mask.sum()))
    if counted == 0:
        raise TrainingError(
            "no token of a batch counts (its loss_mask is empty within the first lm.seq_len tokens): use longer "
            "sequences, a larger batch or data with more counted tokens"
        )
    return counted / global_batch


def forward_losses(model: Lm, batch: Batch, tokens: float) -> Tensor:
    """l_i of a micro-batch."""
    return losses_and_statistics(model, batch, tokens, "none")[0]


def losses_and_statistics(
    model: Lm, batch: Batch, tokens: float, statistics: Statistics
) -> tuple[Tensor, Tensor | None]:
    """(l_i, what a weighting looks at, detached) of a micro-batch, from one forward."""
    output: LmOutput = model(batch.input_ids, entropies=statistics == "loss_and_entropy")
    losses_b = sample_losses(output.losses_bT, batch.mask, tokens)
    if statistics == "none":
        return losses_b, None
    if statistics == "embedding":
        return losses_b, output.embeddings_bd.float()
    if statistics == "tokens":
        return losses_b, output.losses_bT.detach()
    found = [output.losses_bT.detach()]
    if output.entropies_bT is not None:
        found.append(output.entropies_bT)
    return losses_b, torch.stack([sample_means(values_bT, batch.mask) for values_bT in found], dim=1)


@torch.no_grad()
def batch_losses(model: Lm, batch: Batch, micro_batch: int, tokens: float) -> Tensor:
    """l_i of this rank's share without a graph, (b,)."""
    return torch.cat([forward_losses(model, part, tokens) for part in batch.micro_batches(micro_batch)])


class LowerLevel:
    """The LM, its optimizer and the step that joins them."""

    def __init__(self, model: Lm, mesh: DeviceMesh, config: TrainConfig) -> None:
        self.model, self.layout, self.config = model, Layout(mesh), config
        self.optimizer = build_optimizer(model, config)
        self.parameters = list(model.parameters())

    def lr(self, step: int) -> float:
        """Learning rate of LM step `step` (from 0)."""
        c = self.config
        return c.lr * lr_factor(
            step,
            total_steps=c.steps,
            warmup_steps=c.warmup_steps,
            schedule=c.schedule,
            min_ratio=c.min_lr_ratio,
            decay_fraction=c.decay_fraction,
        )

    def step(self, step: int, batch: Batch, weighting: Weighting | None) -> StepResult:
        """Forward, weights, backward, clip, optimizer step; the clipped gradients stay in place.

        Raises:
            TrainingError: where the loss or its gradient is not finite; the optimizer has not moved.
        """
        micro = batch.micro_batches(self.config.micro_batch)
        tokens = tokens_per_sample(batch, self.config.global_batch)
        # A single micro-batch is weighed between its forward and its backward: its statistics cost nothing.
        statistics = weighting.statistics if weighting is not None else "none"
        times = {part: Stopwatch() for part in ("weigh", "forward", "backward", "optimizer")}
        first = None
        if len(micro) == 1:
            with times["forward"].passage():
                first = losses_and_statistics(self.model, micro[0], tokens, statistics)
        with times["weigh"].passage():
            statistics_bS = first[1] if first is not None else self._statistics(micro, tokens, statistics)
            scores_B, weights_B = self._weights(batch, weighting, statistics_bS)
        weights_b = own_rows(weights_B, len(batch))
        losses = []
        for index, part in enumerate(micro):
            with times["forward"].passage():
                losses_m = first[0] if first is not None else forward_losses(self.model, part, tokens)
            offset = index * self.config.micro_batch
            # FSDP averages gradients over ranks; times W, the average is the weighted sum.
            objective = dist.get_world_size() * torch.dot(weights_b[offset : offset + len(part)], losses_m)
            with times["backward"].passage():
                objective.backward()
            losses.append(losses_m.detach())
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with times["optimizer"].passage():
            norm = self._clip(step)
            self.optimizer.step()
        return StepResult(torch.cat(losses), scores_B, weights_B, statistics_bS, tokens, norm, lr, times)

    @torch.no_grad()
    def _statistics(self, micro: list[Batch], tokens: float, statistics: Statistics) -> Tensor | None:
        if statistics == "none":
            return None
        found = [losses_and_statistics(self.model, part, tokens, statistics)[1] for part in micro]
        return torch.cat([x for x in found if x is not None])

    def _weights(
        self, batch: Batch, weighting: Weighting | None, statistics_bS: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        if weighting is None:
            size = self.config.global_batch
            return None, torch.full((size,), 1.0 / size, device=batch.input_ids.device)
        return weighting.weigh(batch, statistics_bS)

    def _clip(self, step: int) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        norm = float(total)
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradient is not finite at step {step} (norm {norm}): lower train.lr or train.clip_norm; "
                "the last checkpoint is intact"
            )
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, total)
        return norm

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """A copy of this rank's shards of the LM."""
        return [shard(p).clone() for p in self.parameters]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Put values into this rank's shards of the LM."""
        self._reshard()
        torch._foreach_copy_([shard(p) for p in self.parameters], list(values))

    @torch.no_grad()
    def everything(self) -> list[Tensor]:
        """A copy of this rank's shards of the LM and of the optimizer's state."""
        return [x.clone() for x in self._state()]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Put back what `everything` gave."""
        self._reshard()
        torch._foreach_copy_(self._state(), list(values))

    def _reshard(self) -> None:
        """Drop what is gathered: after a no-grad forward it is still there, and would hide a change of the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _state(self) -> list[Tensor]:
        slots = (self.optimizer.state[p][k] for p in self.parameters for k in sorted(self.optimizer.state[p]))
        return [shard(p.detach()) for p in self.parameters] + [shard(x) for x in slots if isinstance(x, Tensor)]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
