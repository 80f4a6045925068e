"""Estimators of <u, grad l_i(theta)> for all i: from a loss function, parameters and a direction to B scalars.

`exact` and `jvp` are oracles (fp64 or fp32, unsharded); the finite differences need forwards and no graph, and
therefore also run on shards: whoever hands in `losses` decides what "evaluate at these parameters" means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Losses = Callable[[Sequence[Tensor]], Tensor]
"""Parameters (or this rank's shards of them) -> per-sample losses of shape (B,)."""


def exact(losses: Losses, params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """One backward pass per sample: the definition itself."""
    params = [p.detach().requires_grad_() for p in params]
    values_B = losses(params)
    dots = []
    for value in values_B:
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        dots.append(sum((torch.sum(g * u) for g, u in zip(grads, direction, strict=True) if g is not None), start=0.0))
    return torch.stack([torch.as_tensor(d, dtype=values_B.dtype) for d in dots])


def jvp(losses: Losses, params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """Forward-mode derivative of the loss vector along the direction: exact, one pass.

    Fused attention kernels have no forward derivative; call it under the MATH attention kernel.
    """
    primals = tuple(p.detach() for p in params)
    tangents = tuple(u.detach() for u in direction)
    return torch.func.jvp(lambda *p: losses(p), primals, tangents)[1]


@torch.no_grad()
def central(losses: Losses, params: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Tensor:
    """Central difference (l(theta + h u) - l(theta - h u)) / 2h, error O(h^2).

    Args:
        step: h; about 1e-2 / |u| is right in fp32 for an LM (rounding against curvature).
    """
    plus_B = losses(torch._foreach_add(list(params), list(direction), alpha=step))
    minus_B = losses(torch._foreach_add(list(params), list(direction), alpha=-step))
    return (plus_B - minus_B) / (2 * step)


@torch.no_grad()
def one_sided(
    losses: Losses, params: Sequence[Tensor], direction: Sequence[Tensor], step: float, base_B: Tensor
) -> Tensor:
    """Forward difference (l(theta + h u) - l(theta)) / h, error O(h): half the price of `central`.

    Args:
        step: h.
        base_B: l(theta), which training has computed already; in the same precision as `losses` computes.
    """
    return (losses(torch._foreach_add(list(params), list(direction), alpha=step)) - base_B) / step


def richardson(losses: Losses, params: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Tensor:
    """Central differences at h and 2h, extrapolated: (4 D(h) - D(2h)) / 3, error O(h^4), four forwards.

    A judge for the estimators above that also runs on shards.
    """
    narrow_B, wide_B = (central(losses, params, direction, k * step) for k in (1, 2))
    return (4 * narrow_B - wide_B) / 3
