"""The bi-level step of the LM side: alignments a_i = dL_target/dw_i, exact for SGD and AdamW with clipping.

Order of events at a bi-level step, theta -> theta' being the LM's ordinary step:
    begin: remember theta; with target_at=theta, v = grad L_target(theta)
    [the LM's step; `ghost` and `ghost_lowrank` watch its backward]
    finish: with target_at=theta_prime, v = grad L_target(theta'); u = C^T (D * v); a_i = -lr <u, grad l_i(theta)>
Everything works on this rank's shards; inner products are summed over ranks.

Legend: b = this rank's sequences of the global batch, c = those that are contracted, C = those of all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ray_dwm.config import BilevelConfig
from ray_dwm.core.hypergradient import adamw_gain, adamw_jacobian, clip_coefficient, clip_transpose, sgd_jacobian
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.clock import synchronize
from ray_dwm.engine.contraction import Contracted, Estimator, FiniteDifference, Oracle, Problem, Shards, shards_of
from ray_dwm.engine.ghost import Ghost
from ray_dwm.engine.mesh import all_sum, own_rows, shard
from ray_dwm.engine.sketch import GhostLowRank
from ray_dwm.engine.step import LowerLevel, StepResult
from ray_dwm.engine.target import TargetGradient, Targets
from ray_dwm.engine.weighting import GivenWeights
from ray_dwm.errors import ConfigError, NotFinite

PHASES = ("target_gradient", "direction", "contraction", "watch", "fidelity")

PROBE = 0.1
"""Largest part of a weight by which trying out moves it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a bi-level step brings."""

    alignments_C: Tensor
    """a_i of the contracted sequences of all ranks, (C,)."""
    positions_C: Tensor
    """Their places in the global batch."""
    figures: dict[str, float]
    """For metrics.jsonl."""


@dataclass(slots=True)
class _Begun:
    """What `begin` leaves for `finish`."""

    step: int
    targets: Targets
    theta: Shards
    contracted: Contracted
    direction: Shards | None = None
    """u, where it is made before the step: `ghost`."""
    audit: bool = False
    before: list[Tensor] = field(default_factory=list)
    """LM and optimizer before the step, where it is audited."""


class BilevelStep:
    """Computes the alignments around one LM step.

    Memory on top of training: the step's gradient, and v in whose place u is made, a copy of this rank's shards each;
    for finite differences three more (theta, theta' and the values that are written), one more for a v that is kept and
    for every target set beyond the first, and at a step that is audited two copies of LM and optimizer state.
    """

    def __init__(self, lower: LowerLevel, config: BilevelConfig) -> None:
        self._lower, self._config = lower, config
        # The list must be taken while the model is sharded: after a forward the root stays gathered.
        self._parameters = lower.parameters
        _require_plain_sharding(self._parameters)
        self._estimator = build_estimator(lower, config)
        self._judge = FiniteDifference(lower, config, "richardson")
        self.target = TargetGradient(lower, config)
        self._begun: _Begun | None = None
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Of the last bi-level step, by part; `watch` ran inside the LM's step."""

    @property
    def watch_seconds(self) -> float:
        """Seconds that the estimator took inside the LM's step."""
        return self._estimator.watch_seconds

    def begin(self, step: int, update: int, batch: Batch, targets: Targets) -> None:
        """Before LM step `step`, which makes DWM version `update` + 1."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        stride = round(1 / self._config.fraction)
        contracted = Contracted.choose(update % stride, stride, batch, self._lower.config.global_batch)
        audit = self._config.fidelity_every > 0 and update % self._config.fidelity_every == 0
        theta = self._lower.snapshot() if audit or self._estimator.needs_theta else []
        begun = _Begun(step, targets, theta, contracted, audit=audit)
        if begun.audit:
            begun.before = self._lower.everything()
        if self._config.target_at == "theta":
            self._refresh(step, update, targets)
            if self._config.estimator == "ghost":
                with self._timed("direction"), torch.no_grad():
                    begun.direction = [self._gain(p) * x for p, x in zip(self._parameters, self.target.v, strict=True)]
        with self._timed("direction"):
            self._estimator.watch(contracted.rows_c, begun.direction)
        self._begun, self._update = begun, update

    def finish(self, batch: Batch, result: StepResult) -> Outcome:
        """After the LM's step; its gradients are consumed, theta' is left in place.

        Raises:
            NotFinite: the target's gradient or an alignment is not finite.
        """
        begun, self._begun = self._begun, None
        assert begun is not None, "begin comes first"
        self._estimator.stop()
        self.seconds["watch"] = self.watch_seconds
        clipped = shards_of(self._parameters)
        self._lower.zero_grad()
        if self._config.target_at == "theta_prime":
            self._refresh(begun.step, self._update, begun.targets)
        with self._timed("direction"), torch.no_grad():
            figures = self._by_set(clipped, result)
            spare = self._config.reuse == 1 and not begun.audit
            u = begun.direction or self._direction(self.target.v, clipped, result.grad_norm, consume=spare)
            self._require_finite(u, result)
        with self._timed("contraction"):
            dots_c = self._estimator.contract(self._problem(begun, u, batch, result, begun.contracted.rows_c))
        if begun.direction is not None:  # the clipping was not known yet; its radial part stays unknown
            dots_c = clip_coefficient(result.grad_norm, self._lower.config.clip_norm) * dots_c
        if not bool(torch.isfinite(all_sum(dots_c.sum()))):
            raise NotFinite(
                f"the alignments of step {begun.step} are not finite (bilevel.estimator={self._config.estimator}): try "
                "bilevel.estimator=central, or lower train.lr; the last checkpoint is intact"
            )
        found = Outcome(*begun.contracted.gather(-result.lr * dots_c), figures)
        if begun.audit:
            with self._timed("fidelity"):
                figures["dwm/fidelity"] = self._fidelity(begun, dots_c, clipped, batch, result)
                figures |= self._try_out(begun, found, batch, result)
        if self._config.reuse == 1:
            self.target.forget()
        return found

    def _problem(self, begun: _Begun, u: Shards, batch: Batch, result: StepResult, rows_c: Tensor) -> Problem:
        return Problem(
            theta=begun.theta,
            direction=u,
            batch=batch.rows(rows_c),
            losses_c=result.losses_b[rows_c],
            scale_c=dist.get_world_size() * own_rows(result.weights_B, len(batch))[rows_c],
            tokens=result.tokens_per_sample,
        )

    def _refresh(self, step: int, update: int, targets: Targets) -> None:
        if self.target.due(step, update):
            with self._timed("target_gradient"):
                self.target.make(step, targets)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[phase] += time.perf_counter() - start

    @torch.no_grad()
    def _direction(self, v: Shards, clipped: Shards, norm: float, consume: bool = False) -> Shards:
        """u = C^T (D * v); in the place of v where it may be consumed."""
        u = v if consume else list(v)
        for index, (p, g) in enumerate(zip(self._parameters, clipped, strict=True)):
            jacobian = self._jacobian(p, g)
            u[index] = v[index].mul_(jacobian) if consume else v[index] * jacobian
        max_norm = self._lower.config.clip_norm
        coefficient = clip_coefficient(norm, max_norm)
        if coefficient == 1.0:
            return u
        # With g_c = k g, <g, x> g = <g_c, x> g_c / k^2: the unclipped gradient need not be made again.
        dot = self._lower.layout.dot(clipped, u) / coefficient**2
        for index, g in enumerate(clipped):
            u[index] = clip_transpose(u[index], g, dot, norm, max_norm)
        return u

    def _jacobian(self, parameter: Tensor, clipped: Tensor) -> Tensor | float:
        if self._config.preconditioner == "none":
            return 1.0
        config, state = self._lower.config, self._lower.optimizer.state[parameter]
        if config.optimizer == "sgd":
            return sgd_jacobian(config.momentum, dampening=0.0, nesterov=False, first_step=False)
        moments = shard(state["exp_avg"]), shard(state["exp_avg_sq"]), int(state["step"])
        return adamw_jacobian(clipped, *moments, config.beta1, config.beta2, config.eps)

    def _gain(self, parameter: Tensor) -> Tensor | float:
        """What is known of D before the step."""
        if self._config.preconditioner == "none":
            return 1.0
        config, state = self._lower.config, self._lower.optimizer.state[parameter]
        if config.optimizer == "sgd":
            return sgd_jacobian(config.momentum, dampening=0.0, nesterov=False, first_step=False)
        square = shard(state["exp_avg_sq"])
        return adamw_gain(square, int(state["step"]), config.beta1, config.beta2, config.eps)

    def _require_finite(self, u: Shards, result: StepResult) -> None:
        norm = self._lower.layout.norm(u)
        if not math.isfinite(norm):
            raise NotFinite(
                f"the target set's gradient is not finite ({norm}) after a step of learning rate {result.lr:g}: "
                "lower train.lr; the last checkpoint is intact"
            )

    def _by_set(self, clipped: Shards, result: StepResult) -> dict[str, float]:
        """Every set's alignment with the batch as it was weighted, -lr <D * v_set, clipped gradient>, in nats."""
        figures = {}
        for name, v in self.target.by_set.items():
            scaled = [self._jacobian(p, g) * x for p, g, x in zip(self._parameters, clipped, v, strict=True)]
            figures[f"bilevel/alignment/{name}"] = -result.lr * self._lower.layout.dot(scaled, clipped)
        return figures

    def _fidelity(self, begun: _Begun, dots_c: Tensor, clipped: Shards, batch: Batch, result: StepResult) -> float:
        """Cosine of the alignments with a better estimator's, on some of the contracted sequences.

        The judge's u is always that of the definition: v at theta' on this step's target batch, D and C after the step.
        """
        v = self.target.v
        if self._config.target_at != "theta_prime" or self.target.step != begun.step:
            v = self.target.gradient(begun.targets)[0]
        u = self._direction(v, clipped, result.grad_norm)
        some = begun.contracted.first(-(-self._config.fidelity_sequences // dist.get_world_size()))
        judged_C, _ = some.gather(self._judge.contract(self._problem(begun, u, batch, result, some.rows_c)))
        return centred_cosine(some.gather(dots_c[: len(some.rows_c)])[0], judged_C)

    def _try_out(self, begun: _Begun, found: Outcome, batch: Batch, result: StepResult) -> dict[str, float]:
        """What other weights would have done to the target loss: as the alignments predict it, and as it is.

        The step is taken again from theta with weights moved along -a, by up to `PROBE` of themselves; then everything
        is put back. This tests the whole chain: v, D, C, the contraction and their scale.
        """
        alignments_C, positions_C = found.alignments_C, found.positions_C
        move_C = alignments_C.mean() - alignments_C
        move_C = move_C * (PROBE * (result.weights_B[positions_C] / move_C.abs().clamp(min=1e-30)).min())
        weights_B = result.weights_B.index_add(0, positions_C, move_C)
        after, loss = self._lower.everything(), self.target.loss(begun.targets)
        self._lower.restore(begun.before)
        self._lower.step(begun.step, batch, GivenWeights(weights_B))
        self._lower.zero_grad()
        change = self.target.loss(begun.targets) - loss
        self._lower.restore(after)
        predicted = float(torch.dot(alignments_C.double(), move_C.double()))
        return {"bilevel/predicted_change": predicted, "bilevel/realised_change": change}


def centred_cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two vectors after their means are taken off: what the softmax sees of them."""
    left, right = left.double(), right.double()
    return float(F.cosine_similarity(left - left.mean(), right - right.mean(), dim=0))


def _require_plain_sharding(parameters: list[Tensor]) -> None:
    for p in parameters:
        by_rows = not isinstance(p, DTensor) or p.placements in ((Shard(0),), (Replicate(), Shard(0)))
        if not by_rows or p.dtype != torch.float32:
            raise ConfigError(
                f"the bi-level step knows fp32 parameters sharded by rows, not {p.dtype} with "
                f"{getattr(p, 'placements', 'no placement')}: use FSDP or HSDP with fp32 master parameters"
            )


def build_estimator(lower: LowerLevel, config: BilevelConfig) -> Estimator:
    """The estimator that a configuration names."""
    if config.estimator == "ghost":
        return Ghost(lower)
    if config.estimator == "ghost_lowrank":
        return GhostLowRank(lower, config.rank)
    if config.estimator in ("exact", "jvp"):
        return Oracle(lower, config.estimator)
    return FiniteDifference(lower, config, config.estimator)
