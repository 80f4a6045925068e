"""From a direction u to <u, grad l_i(theta)> of this rank's sequences: the estimators' common protocol.

Every estimator takes the same `Problem` and returns the same numbers. Those that need the LM's ordinary backward
(engine/ghost.py) also get to watch it; the others ignore that.

Legend: b = this rank's sequences of the global batch, c <= b = those that are contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from ray_dwm.config import BilevelConfig
from ray_dwm.core import estimators
from ray_dwm.core.losses import sample_losses, token_losses
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.mesh import all_gather_rows, shard
from ray_dwm.engine.step import LowerLevel, batch_losses

Shards = list[Tensor]
"""One tensor per LM parameter: this rank's part of it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be contracted."""

    theta: Shards
    """Where the sequences' gradients are taken: the LM before its step."""
    direction: Shards
    """u"""
    batch: Batch
    """The contracted sequences of this rank."""
    losses_c: Tensor
    """Their l_i(theta), as the step computed them."""
    scale_c: Tensor
    """Factor with which the step's backward multiplied their gradients: ranks times weight."""
    tokens: float
    """Counted tokens of a mean sequence of the global batch."""


@dataclass(frozen=True, slots=True)
class Contracted:
    """Which sequences are contracted: every stride-th of the global batch, whatever the number of ranks."""

    rows_c: Tensor
    """Their rows in this rank's share. As many on every rank: there may be one at the end that is not meant."""
    positions_c: Tensor
    """Their places in the global batch; its size, one beyond its end, where a row is not meant."""
    size: int

    @staticmethod
    def choose(offset: int, stride: int, batch: Batch, size: int) -> Contracted:
        """The sequences at offset, offset + stride .. of the global batch of `size`, of which `batch` is the share."""
        share = len(batch)
        start = dist.get_rank() * share
        rows_c = torch.arange((offset - start) % stride, -(-share // stride) * stride, stride)
        meant_c = (rows_c < share) & (start + rows_c < size)
        positions_c = torch.where(meant_c, start + rows_c, size)
        place = batch.input_ids.device
        return Contracted(rows_c.clamp(max=share - 1).to(place), positions_c.to(place), size)

    def first(self, count: int) -> Contracted:
        """The first `count` of every rank."""
        return Contracted(self.rows_c[:count], self.positions_c[:count], self.size)

    def gather(self, values_c: Tensor) -> tuple[Tensor, Tensor]:
        """(values, places in the global batch) of all ranks, (C,) each, without the rows that are not meant."""
        positions_C = all_gather_rows(self.positions_c)
        meant_C = positions_C < self.size
        return all_gather_rows(values_c)[meant_C], positions_C[meant_C]


class Estimator(Protocol):
    """<u, grad l_i(theta)> for all contracted sequences."""

    needs_theta: bool
    """Whether `Problem.theta` must be there; it is empty otherwise."""

    def watch(self, rows_c: Tensor, direction: Shards | None) -> None:
        """Before the LM's step: these rows of this rank's share will be contracted, with u if it is known already."""
        ...

    def stop(self) -> None:
        """After the LM's step: stop watching."""
        ...

    def contract(self, problem: Problem) -> Tensor:
        """After `stop`: (c,) inner products; the LM is left as it was."""
        ...

    @property
    def watch_seconds(self) -> float:
        """What watching the last step's backward took, which ran inside that step."""
        ...


class FiniteDifference:
    """`central`, `one_sided` or `richardson`: forwards with perturbed shards, no graph."""

    needs_theta, watch_seconds = True, 0.0

    def __init__(self, lower: LowerLevel, config: BilevelConfig, rule: str) -> None:
        self._lower, self._rule = lower, rule
        self._length = config.epsilon or (1e-1 if lower.config.precision == "bf16" else 1e-2)
        if rule == "richardson":
            self._length *= 0.7  # the judge's rounding errors shall not be those of the judged

    def watch(self, rows_c: Tensor, direction: Shards | None) -> None:
        """See Estimator."""

    def stop(self) -> None:
        """See Estimator."""

    def contract(self, problem: Problem) -> Tensor:
        """See Estimator."""
        norm = self._lower.layout.norm(problem.direction)
        if norm == 0.0:
            return torch.zeros_like(problem.losses_c)
        moved = self._lower.snapshot()

        def losses(values: Sequence[Tensor]) -> Tensor:
            self._lower.write(values)
            return batch_losses(self._lower.model, problem.batch, self._lower.config.micro_batch, problem.tokens)

        step = self._length / norm
        try:
            if self._rule == "one_sided":
                return estimators.one_sided(losses, problem.theta, problem.direction, step, problem.losses_c)
            rule = {"central": estimators.central, "richardson": estimators.richardson}[self._rule]
            return rule(losses, problem.theta, problem.direction, step)
        finally:
            # By copy: subtracting the perturbation would leave rounding behind.
            self._lower.write(moved)


class Oracle:
    """`exact` or `jvp` with the whole LM gathered on every rank, under the MATH attention kernel: to check the others.

    Fused attention kernels have no forward derivative, which is why the kernel is chosen here.
    """

    needs_theta, watch_seconds = True, 0.0

    def __init__(self, lower: LowerLevel, rule: str) -> None:
        self._lower, self._rule = lower, {"exact": estimators.exact, "jvp": estimators.jvp}[rule]

    def watch(self, rows_c: Tensor, direction: Shards | None) -> None:
        """See Estimator."""

    def stop(self) -> None:
        """See Estimator."""

    def contract(self, problem: Problem) -> Tensor:
        """See Estimator."""
        parameters, batch = self._lower.parameters, problem.batch
        theta = [whole(p, x) for p, x in zip(parameters, problem.theta, strict=True)]
        u = [whole(p, x) for p, x in zip(parameters, problem.direction, strict=True)]
        twin = LlamaForCausalLM(self._lower.model.config).to(batch.input_ids.device)
        names = [name for name, _ in twin.named_parameters()]

        def losses(values: Sequence[Tensor]) -> Tensor:
            inputs = {"input_ids": batch.input_ids}
            named = dict(zip(names, values, strict=True))
            logits = torch.func.functional_call(twin, named, (), inputs, tie_weights=True).logits
            return sample_losses(token_losses(logits, batch.input_ids), batch.mask, problem.tokens)

        with sdpa_kernel(SDPBackend.MATH):
            return self._rule(losses, theta, u).detach()


def placed(like: Tensor, local: Tensor) -> Tensor:
    """A distributed tensor of which `local` is this rank's part, where `like` is a parameter with the same rows."""
    if not isinstance(like, DTensor):
        return local
    shape = torch.Size([like.shape[0], *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def whole(like: Tensor, local: Tensor) -> Tensor:
    """`placed`, gathered; collective."""
    value = placed(like, local)
    return value.full_tensor() if isinstance(value, DTensor) else value


def shards_of(parameters: Sequence[Tensor]) -> Shards:
    """Gradients of this rank's shards, zero where there is none."""
    return [torch.zeros_like(shard(p)) if p.grad is None else shard(p.grad) for p in parameters]
