"""The bi-level step of the LM side: B alignments a_i = dL_target/dw_i, exact for SGD and AdamW with clipping.

Order of events at a bi-level step, theta -> theta' being the LM's ordinary step:
    snapshot theta; [step]; v = grad L_target(theta'); u = C^T (D * v); <u, grad l_i(theta)>; back to theta'.
Everything works on this rank's shards; inner products are summed over ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from ray_dwm.config import BilevelConfig
from ray_dwm.core import estimators
from ray_dwm.core.hypergradient import adamw_jacobian, clip_coefficient, clip_transpose, sgd_jacobian
from ray_dwm.core.losses import sample_losses
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.mesh import shard, shards_dot
from ray_dwm.engine.step import LowerLevel, StepResult, batch_losses, forward_losses, tokens_per_sample
from ray_dwm.errors import TrainingError

PHASES = ("target_gradient", "direction", "contraction")


class BilevelStep:
    """Computes the alignments around one LM step.

    Memory on top of training: at most five copies of this rank's shards at once (theta, v, the optimizer's Jacobian
    and u while the direction is computed; theta, theta', u and the values that are written during the contraction).
    """

    def __init__(self, lower: LowerLevel, config: BilevelConfig) -> None:
        self._lower, self._config = lower, config
        # The list must be taken while the model is sharded: after a forward the root stays gathered.
        self._parameters = lower.parameters
        self._epsilon = config.epsilon or (1e-1 if lower.config.precision == "bf16" else 1e-2)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """A copy of theta, this rank's shards, before the step."""
        return [shard(p).clone() for p in self._parameters]

    def alignments(self, theta: list[Tensor], batch: Batch, result: StepResult, target: Batch) -> Tensor:
        """a_i of this rank's share, (b,), after the step; the gradients are consumed, theta' is restored.

        Args:
            theta: `snapshot()` taken before the step.
            batch: the training batch of the step.
            target: this rank's share of the target batch.
        """
        clipped = [torch.zeros_like(shard(p)) if p.grad is None else shard(p.grad) for p in self._parameters]
        self._lower.zero_grad()
        with self._timed("target_gradient"):
            v = self._target_gradient(target)
        with self._timed("direction"):
            u = self._direction(v, clipped, result.grad_norm)
            del v, clipped
            norm = shards_dot(u, u) ** 0.5
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the target set's gradient is not finite ({norm}) after a step of learning rate {result.lr:g}: "
                    "lower train.lr; the last checkpoint is intact"
                )
        with self._timed("contraction"):
            dots_b = self._contract(theta, u, norm, batch, result.tokens_per_sample)
        return -result.lr * dots_b

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - start

    def _target_gradient(self, target: Batch) -> list[Tensor]:
        """v = grad of the target batch's token mean at theta', in fp32."""
        size = len(target) * dist.get_world_size()
        tokens = tokens_per_sample(target, size)
        for part in target.micro_batches(self._lower.config.micro_batch):
            _, losses_m = forward_losses(self._lower.model, part, tokens)
            (dist.get_world_size() * losses_m.sum() / size).backward()
        v = [torch.zeros_like(shard(p)) if p.grad is None else shard(p.grad) for p in self._parameters]
        self._lower.zero_grad()
        return v

    @torch.no_grad()
    def _direction(self, v: list[Tensor], clipped: list[Tensor], norm: float) -> list[Tensor]:
        """u = C^T (D * v)."""
        scaled = [self._jacobian(p, g) * x for p, g, x in zip(self._parameters, clipped, v, strict=True)]
        max_norm = self._lower.config.clip_norm
        coefficient = clip_coefficient(norm, max_norm)
        if coefficient == 1.0:
            return scaled
        grads = torch._foreach_div(clipped, coefficient)
        dot = shards_dot(list(grads), scaled)
        return [clip_transpose(s, g, dot, norm, max_norm) for s, g in zip(scaled, grads, strict=True)]

    def _jacobian(self, parameter: Tensor, clipped: Tensor) -> Tensor | float:
        config, state = self._lower.config, self._lower.optimizer.state[parameter]
        if config.optimizer == "sgd":
            return sgd_jacobian(config.momentum, dampening=0.0, nesterov=False, first_step=False)
        return adamw_jacobian(
            clipped,
            shard(state["exp_avg"]),
            shard(state["exp_avg_sq"]),
            int(state["step"]),
            config.beta1,
            config.beta2,
            config.eps,
        )

    def _contract(self, theta: list[Tensor], u: list[Tensor], norm: float, batch: Batch, tokens: float) -> Tensor:
        """<u, grad l_i(theta)> of this rank's samples."""
        if norm == 0.0:
            return torch.zeros(len(batch), device=batch.input_ids.device)
        moved = self.snapshot()
        try:
            if self._config.estimator == "central":
                losses = self._perturbed_losses(batch, tokens)
                return estimators.central(losses, theta, u, self._epsilon / norm)
            self._write(theta)
            losses, full_theta, full_u = self._unsharded(u, batch, tokens)
            estimator = {"exact": estimators.exact, "jvp": estimators.jvp}[self._config.estimator]
            with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward derivative
                return estimator(losses, full_theta, full_u).detach()
        finally:
            # By copy: subtracting the perturbation would leave rounding behind.
            self._write(moved)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        # FSDPModule.reshard: after a no-grad forward the root is still gathered and would hide the change.
        model: Any = self._lower.model
        model.reshard()
        torch._foreach_copy_([shard(p) for p in self._parameters], list(values))

    def _perturbed_losses(self, batch: Batch, tokens: float) -> estimators.Losses:
        def losses(values: Sequence[Tensor]) -> Tensor:
            self._write(values)
            return batch_losses(self._lower.model, batch, self._lower.config.micro_batch, tokens)

        return losses

    def _unsharded(
        self, u: list[Tensor], batch: Batch, tokens: float
    ) -> tuple[estimators.Losses, list[Tensor], list[Tensor]]:
        """The loss vector as a function of whole parameters: for the oracles, at the price of a whole LM per rank."""
        full_theta = [_full(p.detach(), shard(p.detach())).clone() for p in self._parameters]
        full_u = [_full(p.detach(), x) for p, x in zip(self._parameters, u, strict=True)]
        twin = LlamaForCausalLM(self._lower.model.config).to(batch.input_ids.device)
        names = [name for name, _ in twin.named_parameters()]

        def losses(values: Sequence[Tensor]) -> Tensor:
            inputs = {"input_ids": batch.input_ids}
            params = dict(zip(names, values, strict=True))
            logits = torch.func.functional_call(twin, params, (), inputs, tie_weights=True).logits
            return sample_losses(logits, batch.input_ids, batch.mask, tokens)

        return losses, full_theta, full_u


def _full(like: Tensor, local: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return local
    whole = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()
