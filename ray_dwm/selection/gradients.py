"""Gradient features: per-sequence gradients of an LM's loss, projected to few numbers. Never a loop over sequences.

`dense` projects whole gradients, as TRAK (Park et al. 2023, arXiv 2303.14186, section 3.2) does. `factored` projects
both sides of every matrix's gradient sum_t b_t a_t^T, t over tokens, where they arise in the backward (LoGra: Choe et
al. 2024, arXiv 2405.13954, section 3.1): sum_t (L^T b_t) (R^T a_t)^T, so that no gradient is formed, and none of the
weights' gradients is computed. Where LoGra keeps every matrix's features apart, here they are summed, each under a
projection of its own: inner products stay right in expectation, and a matrix's part has sqrt(k) dimensions a side.

Legend: n = sequences, T = tokens, k = features, r = sqrt(k), I, O = a matrix's inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_dwm.core.losses import sample_losses, token_losses
from ray_dwm.errors import DataError
from ray_dwm.selection.projection import factors, project

Projection = Callable[[nn.Module, Tensor, Tensor, int, int], Tensor]
"""(LM, token ids (n, T), counted predictions (n, T-1), k, seed) -> features (n, k)."""


def losses(logits_nTV: Tensor, ids_nT: Tensor, mask_nT: Tensor) -> Tensor:
    """Nats of every sequence over its predictions, counted or not, (n,): what training sums."""
    return sample_losses(token_losses(logits_nTV, ids_nT), mask_nT, float(mask_nT.shape[1]))


def dense(model: nn.Module, ids_nT: Tensor, mask_nT: Tensor, k: int, seed: int) -> Tensor:
    """Projections of gradients with respect to all parameters; see `Projection`. Holds n gradients."""
    gradients = per_sample(model, ids_nT, mask_nT)
    return project(gradients.values(), k, seed)


def per_sample(model: nn.Module, ids_nT: Tensor, mask_nT: Tensor) -> dict[str, Tensor]:
    """Every sequence's gradient, parameter by parameter, (n, ...)."""

    def loss(weights: dict[str, Tensor], ids_T: Tensor, mask_T: Tensor) -> Tensor:
        logits = functional_call(model, weights, (), {"input_ids": ids_T[None], "use_cache": False}).logits
        return losses(logits, ids_T[None], mask_T[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # the others would loop over the sequences
        return vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), ids_nT, mask_nT)


def factored(model: nn.Module, ids_nT: Tensor, mask_nT: Tensor, k: int, seed: int) -> Tensor:
    """Factored projections of the gradients with respect to all matrices; see `Projection`.

    Gains and biases are left out: they are few. The parameters must not require gradients.

    Raises:
        DataError: a matrix is of a module that is neither Linear nor Embedding.
    """
    rank = math.isqrt(k)
    sides = _sides(model, rank, seed)
    features_nk = torch.zeros(len(ids_nT), rank * rank, device=ids_nT.device)

    def see(module: nn.Module, source: Tensor, gradient: Tensor) -> None:
        left, right = sides[id(module.weight)]
        if isinstance(module, nn.Embedding):
            b_nTr, a_nTr = left[source], gradient.float() @ right
            if module.padding_idx is not None:  # whose row torch gives no gradient
                b_nTr = b_nTr * (source != module.padding_idx)[..., None]
        else:
            b_nTr, a_nTr = gradient.float() @ left, source.float() @ right
        if len(b_nTr) != len(ids_nT):
            raise _unknown(model, module)
        features_nk.add_(torch.bmm(b_nTr.flatten(1, -2).mT, a_nTr.flatten(1, -2)).flatten(1))

    handles = [m.register_forward_hook(_watch(see)) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids_nT, use_cache=False).logits
            losses(logits, ids_nT, mask_nT).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return features_nk


def _watch(see: Callable[[nn.Module, Tensor, Tensor], None]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that shows a module's input and its output's gradient when the backward has found that."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            output.requires_grad_()  # the parameters do not: the backward has to begin to end somewhere
        source = args[0].detach()
        output.register_hook(lambda gradient: see(module, source, gradient.detach()))

    return hook


def _sides(model: nn.Module, rank: int, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """id of every matrix -> its projection's two sides; one that two modules share has one projection."""
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False) if p.dim() > 1}
    for module in owners.values():
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise _unknown(model, module)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return {id(p): factors(seed, i, p.shape, rank, p.device) for i, p in enumerate(matrices)}


def _unknown(model: nn.Module, module: nn.Module) -> DataError:
    return DataError(
        f"proxy LM {getattr(model, 'name_or_path', '')} holds matrices in a {type(module).__name__}, for which there "
        "is no factored projection: set selection.dsdm.projection=dense, or name another proxy"
    )


PROJECTIONS: dict[str, Projection] = {"factored": factored, "dense": dense}
