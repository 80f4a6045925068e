"""The exact alignments at one point of a run, by their definition: a_i = -lr <u, grad l_i(theta)>, u = C^T (D * v).

D and C are core/hypergradient.py's closed form, v is an ordinary backward, and the gradients of single sequences come
from an LM without FSDP, one backward each: nothing of engine/bilevel.py, contraction.py, ghost.py or sketch.py is used.
An LM whose single gradients would not fit in memory is contracted by Richardson's rule instead (four forwards).

Legend: b = this rank's sequences of the global batch B, P = LM parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from ray_dwm.config import BilevelConfig
from ray_dwm.core.hypergradient import adamw_jacobian, clip_coefficient, clip_transpose
from ray_dwm.core.losses import sample_losses, token_losses
from ray_dwm.core.weighting import standardise, weights_from_scores, whole_batch
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.contraction import FiniteDifference, Problem, Shards, shards_of, whole
from ray_dwm.engine.mesh import all_gather_rows, shard
from ray_dwm.engine.step import LowerLevel, StepResult, forward_losses, tokens_per_sample
from ray_dwm.models.dwm import DataWeightingModel


@dataclass(frozen=True, slots=True)
class Taken:
    """An LM step that was taken, and what must be remembered of it."""

    theta: Shards
    moved: Shards
    """theta'"""
    clipped: Shards
    moments: list[tuple[Tensor, Tensor, int]]
    batch: Batch
    result: StepResult


def take(lower: LowerLevel, step: int, batch: Batch, weighting: object) -> Taken:
    """Take LM step `step`."""
    theta = lower.snapshot()
    result = lower.step(step, batch, weighting)  # type: ignore[arg-type]
    clipped = [x.clone() for x in shards_of(lower.parameters)]
    lower.zero_grad()
    states = [lower.optimizer.state[p] for p in lower.parameters]
    moments = [(shard(s["exp_avg"]).clone(), shard(s["exp_avg_sq"]).clone(), int(s["step"])) for s in states]
    return Taken(theta, lower.snapshot(), clipped, moments, batch, result)


def target_gradient(lower: LowerLevel, targets: Batch) -> Shards:
    """v where the LM stands: the gradient of the token mean over all ranks' targets."""
    size = len(targets) * dist.get_world_size()
    tokens = tokens_per_sample(targets, size)
    for part in targets.micro_batches(lower.config.micro_batch):
        (dist.get_world_size() * forward_losses(lower.model, part, tokens).sum() / size).backward()
    v = [x.clone() for x in shards_of(lower.parameters)]
    lower.zero_grad()
    return v


@torch.no_grad()
def direction(lower: LowerLevel, taken: Taken, v: Shards) -> Shards:
    """u = C^T (D * v) of AdamW with clipping."""
    c, norm = lower.config, taken.result.grad_norm
    scaled = [
        adamw_jacobian(g, *moments, c.beta1, c.beta2, c.eps) * x
        for g, moments, x in zip(taken.clipped, taken.moments, v, strict=True)
    ]
    coefficient = clip_coefficient(norm, c.clip_norm)
    if coefficient == 1.0:
        return scaled
    grads = [g / coefficient for g in taken.clipped]
    dot = lower.layout.dot(grads, scaled)
    return [clip_transpose(s, g, dot, norm, c.clip_norm) for s, g in zip(scaled, grads, strict=True)]


class Reference:
    """Exact alignments of one step's sequences for any target gradient."""

    def __init__(self, lower: LowerLevel, taken: Taken, exact: bool) -> None:
        self._lower, self._taken = lower, taken
        self._grads_bP = _single_gradients(lower, taken) if exact else None
        self._judge = FiniteDifference(lower, BilevelConfig(), "richardson")

    def alignments(self, v: Shards) -> Tensor:
        """a over the global batch, (B,)."""
        u = direction(self._lower, self._taken, v)
        if self._grads_bP is None:
            dots_b = self._judge.contract(problem(self._lower, self._taken, u))
        else:
            pairs = zip(self._lower.parameters, u, strict=True)
            dots_b = self._grads_bP @ torch.cat([whole(p, x).flatten() for p, x in pairs])
        return -self._taken.result.lr * all_gather_rows(dots_b)


def problem(lower: LowerLevel, taken: Taken, u: Shards) -> Problem:
    """The step's contraction with u, for an estimator that the engine has."""
    start, size = dist.get_rank() * len(taken.batch), len(taken.batch)
    return Problem(
        theta=taken.theta,
        direction=u,
        batch=taken.batch,
        losses_c=taken.result.losses_b,
        scale_c=dist.get_world_size() * taken.result.weights_B[start : start + size],
        tokens=taken.result.tokens_per_sample,
    )


def _single_gradients(lower: LowerLevel, taken: Taken) -> Tensor:
    """(b, P) in fp32, on an LM without FSDP."""
    batch = taken.batch
    twin = LlamaForCausalLM(lower.model.config).to(batch.input_ids.device)
    parameters = list(twin.parameters())
    with torch.no_grad():
        for mine, theirs, value in zip(parameters, lower.parameters, taken.theta, strict=True):
            mine.copy_(whole(theirs, value))
    rows = []
    for i in range(len(batch)):
        one = slice(i, i + 1)
        logits = twin(input_ids=batch.input_ids[one]).logits
        losses_1T = token_losses(logits, batch.input_ids[one])
        loss = sample_losses(losses_1T, batch.mask[one], taken.result.tokens_per_sample).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


class PhiKernel:
    """Cosines of phi-gradients without making one: <J^T a, J^T a'> = a^T K a', K = J J^T, J = dw/dphi.

    The pull to uniform weights (`bilevel.kl`) is left out: it has no error, and would raise every cosine.
    """

    def __init__(self, dwm: DataWeightingModel, ids_BT: Tensor, temperature: float, floor: float) -> None:
        parameters = list(dwm.parameters())
        weights_B = weights_from_scores(dwm(ids_BT), temperature, floor)
        rows = []
        for weight in weights_B:
            grads = torch.autograd.grad(weight, parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in grads if g is not None]).double())
        jacobian_BP = torch.stack(rows)
        self._kernel_BB = jacobian_BP @ jacobian_BP.T

    def cosine(self, values_C: Tensor, positions_C: Tensor, reference_B: Tensor, same: bool = True) -> float:
        """Of the gradients that the alignments of some sequences and a reference give to the DWM.

        Args:
            same: of the reference, the same sequences count; else all.
        """
        everywhere = torch.arange(len(reference_B), device=reference_B.device)
        places = positions_C if same else everywhere
        a_B, r_B = self._vector(values_C, positions_C), self._vector(reference_B[places], places)
        k = self._kernel_BB
        return float((a_B @ k @ r_B) / torch.sqrt((a_B @ k @ a_B) * (r_B @ k @ r_B)))

    def _vector(self, values_C: Tensor, positions_C: Tensor) -> Tensor:
        standard_C, _ = standardise(values_C.double(), 0.0, 0.0)
        return whole_batch(standard_C, positions_C, len(self._kernel_BB))
