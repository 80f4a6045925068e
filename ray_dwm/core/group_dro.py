"""Group distributionally robust optimisation over domains, with which DoReMi learns domain weights.

Xie et al. 2023 (arXiv 2305.10429), section 2; Sagawa et al. 2019 (arXiv 1911.08731). The problem is

    min over theta, max over alpha in the simplex of   sum_d alpha_d lambda_d(theta)

where lambda_d is domain d's mean excess loss per token over a frozen reference LM. Only alpha's step is here; theta's
is the LM's own, on sequences weighted by `sequence_weights`.

Legend: D = domains, B = sequences of the global batch, T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_dwm.core.weighting import normalised_entropy


@dataclass(frozen=True, slots=True)
class Dro:
    """The state of alpha; all of it in double precision, (D,)."""

    alpha_D: Tensor
    """Domain weights, sum 1."""
    average_D: Tensor
    """Mean of alpha over all updates: DoReMi's result. Before the first, alpha."""
    excess_D: Tensor
    """lambda in nats per token, as last seen of each domain; NaN where it has not been seen yet."""
    updates: int
    collapsed: int = 0
    """Updates in a row after which the same domain had nearly all the weight."""


def start(alpha_D: Tensor) -> Dro:
    """Before the first update, from weights that are normalised to sum 1."""
    alpha_D = alpha_D.double() / alpha_D.double().sum()
    return Dro(alpha_D, alpha_D.clone(), torch.full_like(alpha_D, torch.nan), 0)


def excess_sums(losses_BT: Tensor, reference_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    """Sum over a sequence's counted tokens of max(l - l_ref, 0) in nats, (B, T-1) -> (B,).

    Without a reference, of l: then lambda_d is the raw loss, and what follows is plain Group DRO.
    """
    excess_BT = losses_BT if reference_BT is None else (losses_BT - reference_BT).clamp(min=0.0)
    return (excess_BT * mask_BT).sum(dim=1)


def domain_sums(values_B: Tensor, codes_B: Tensor, domains: int) -> Tensor:
    """Sum over each domain's sequences, (B,) -> (D,)."""
    return torch.zeros(domains, dtype=torch.float64).index_add(0, codes_B, values_B.double())


def update(
    state: Dro, sums_D: Tensor, tokens_D: Tensor, *, eta: float, smoothing: float, min_entropy: float = 0.0
) -> Dro:
    """One exponentiated-gradient step: alpha_d <- alpha_d exp(eta lambda_d), normalised, (1 - c) alpha + c / D.

    A domain without a token in the batch keeps the lambda of the last batch that had some, as in the published code:
    every observation then counts for as long as none is newer. One that was never seen gets the mean of the others, and
    so keeps its weight against them (the published code takes log V, which would raise it from step to step).

    Args:
        sums_D: clipped excess losses of the global batch in nats, summed over each domain's tokens.
        tokens_D: counted tokens of each domain in the global batch.
        eta: step size; the paper's is 1.
        smoothing: c in [0, 1], a floor of c / D under every weight; the paper's is 1e-3.
        min_entropy: alpha's entropy over log D below which one domain has nearly all.
    """
    excess_D = torch.where(tokens_D > 0, sums_D / tokens_D.clamp(min=1), state.excess_D)
    known_D = ~excess_D.isnan()
    applied_D = torch.where(known_D, excess_D, excess_D[known_D].mean())
    alpha_D = torch.softmax(state.alpha_D.log() + eta * applied_D, dim=0)
    alpha_D = (1.0 - smoothing) * alpha_D + smoothing / len(alpha_D)
    average_D = state.average_D + (alpha_D - state.average_D) / (state.updates + 1)
    collapsed = 0
    if float(normalised_entropy(alpha_D)) < min_entropy:
        same = bool(alpha_D.argmax() == state.alpha_D.argmax())
        collapsed = state.collapsed + 1 if same else 1
    return Dro(alpha_D, average_D, excess_D, state.updates + 1, collapsed)


def presence(shares_D: Tensor, batch: int) -> Tensor:
    """Probability that a batch drawn from the pool has a sequence of each domain, (D,): 1 - (1 - q_d)^B.

    Args:
        shares_D: q, the domains' shares of the pool's sequences.
    """
    return -torch.expm1(batch * torch.log1p(-shares_D.double()))


def sequence_weights(alpha_D: Tensor, presence_D: Tensor, tokens_B: Tensor, codes_B: Tensor) -> Tensor:
    """Weights of the global batch, (B,), sum 1, under which its loss estimates sum_d alpha_d (mean token loss of d).

    The paper draws domains uniformly, so that all are in every batch; here a batch is drawn from the pool, where domain
    d has N_d counted tokens in it, or none. Each of them gets alpha_d / (p_d N_d), with p_d the probability that the
    domain is in a batch at all: where it is there, its mean loss over the batch estimates that over the domain, and
    1 / p_d makes up for the batches without it, so that over many batches its weight is alpha_d. In large batches p_d
    is 1 and N_d the part q_d of all tokens: these are then the importance weights alpha_d / q_d of the published code.
    They are normalised, as there, so that a batch without some domain is a full step all the same. That takes from rare
    domains part of what 1 / p_d gives: one of them, beside others that are always there, has over many batches the
    weight alpha_d / (1 + alpha_d (1 / p_d - 1)). Where sequences count different numbers of tokens the sum has a
    further factor, the same for all domains, because weights sum to 1 over sequences and not over tokens.

    Args:
        presence_D: `presence`.
        tokens_B: counted tokens of each sequence.
        codes_B: each sequence's domain.
    """
    tokens_D = domain_sums(tokens_B, codes_B, len(alpha_D))
    per_token_D = alpha_D / (presence_D * tokens_D.clamp(min=1))
    weights_B = per_token_D[codes_B] * (tokens_D[codes_B] > 0)
    return weights_B / weights_B.sum()
