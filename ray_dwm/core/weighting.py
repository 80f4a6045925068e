"""Scores to weights: temperature, floor, regularisers and collapse measures.

Legend: B = sequences in the global optimizer batch. Weights sum to 1; uniform is 1/B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights_from_scores(scores_B: Tensor, temperature: float = 1.0, floor: float = 0.0) -> Tensor:
    """Relative weights of a global batch: w = (1 - floor) softmax(z / temperature) + floor / B.

    Args:
        scores_B: scores of the whole global batch, shape (B,).
        temperature: larger is closer to uniform; > 0.
        floor: share of the weight that is dealt out uniformly, in [0, 1): a guard against collapse.

    Returns:
        Weights of shape (B,) that sum to 1; exactly 1/B where all scores are equal and B is a power of two.
    """
    weights_B = torch.softmax(scores_B / temperature, dim=0)
    uniform = 1.0 / scores_B.numel()
    return weights_B + floor * (uniform - weights_B) if floor else weights_B


def kl_to_uniform(weights_B: Tensor) -> Tensor:
    """KL(w || uniform) = sum_i w_i log(B w_i), in nats: 0 for uniform, log B for a single sample."""
    return torch.dot(weights_B, log_relative(weights_B))


def log_relative(weights_B: Tensor) -> Tensor:
    """log(B w); finite, with a finite gradient, where a weight has underflowed to 0."""
    return torch.log(weights_B.clamp(min=torch.finfo(weights_B.dtype).tiny) * weights_B.numel())


def effective_sample_size(weights_B: Tensor) -> Tensor:
    """ESS = 1 / sum w^2 (Kish): B for uniform weights, 1 when one sample holds all weight."""
    return weights_B.square().sum().reciprocal()


def normalised_entropy(weights_B: Tensor) -> Tensor:
    """Entropy of the weights over log B: 1 for uniform, 0 for a single sample."""
    return 1.0 - kl_to_uniform(weights_B) / math.log(max(weights_B.numel(), 2))


def upper_objective(weights_B: Tensor, alignments_B: Tensor, kl: float) -> Tensor:
    """A scalar whose gradient in the weights is the hypergradient's: <a, w> + kl * KL(w || uniform).

    The upper level J(phi) = L_target(theta'(phi)) + kl KL(w || uniform) depends on the DWM only through
    the weights, so dJ/dw = a + kl (log(B w) + 1) with a_i = dL_target/dw_i, and autograd carries that
    through `weights_from_scores` and the DWM.

    Args:
        weights_B: weights with a graph to the DWM's parameters, shape (B,).
        alignments_B: a_i, detached, shape (B,).
        kl: strength of the pull to uniform; unit-free when the alignments are standardised.
    """
    return torch.dot(weights_B, alignments_B.detach()) + kl * kl_to_uniform(weights_B)


def score_gradient(scores_B: Tensor, alignments_B: Tensor, kl: float, temperature: float, floor: float) -> Tensor:
    """dJ/dz in closed form: (1 - floor)/tau (diag(p) - p p^T)(a + kl (log(B w) + 1)), p = softmax(z / tau)."""
    p_B = torch.softmax(scores_B / temperature, dim=0)
    w_B = weights_from_scores(scores_B, temperature, floor)
    slope_B = alignments_B + kl * (log_relative(w_B) + 1.0)
    return (1.0 - floor) / temperature * p_B * (slope_B - torch.dot(p_B, slope_B))


def standardise(alignments_B: Tensor, running_variance: float, decay: float) -> tuple[Tensor, float]:
    """Centre the alignments and divide them by a running standard deviation.

    Without units, `kl` means the same for a 370M and a 1.3B LM and at the start and the end of training.
    At the optimum of the regularised problem w_i is proportional to exp(-a_i / (kl * scale)).

    Args:
        alignments_B: raw alignments, shape (B,).
        running_variance: variance carried from earlier updates; 0 before the first.
        decay: memory of the running variance, in [0, 1).

    Returns:
        (standardised alignments, new running variance).
    """
    centred_B = alignments_B - alignments_B.mean()
    # fp32 would underflow below 1e-19. Over n - 1: a part of a batch has the scale of the whole.
    variance = float(centred_B.double().square().sum()) / max(len(centred_B) - 1, 1)
    running = variance if running_variance == 0.0 else decay * running_variance + (1 - decay) * variance
    return centred_B / max(math.sqrt(running), torch.finfo(alignments_B.dtype).tiny), running


def whole_batch(standard_C: Tensor, positions_C: Tensor, size: int) -> Tensor:
    """Alignments of a part of the batch, made into a vector over the whole batch that stands for all of it.

    The part's centred alignments times (B - 1) / (C - 1), and 0 elsewhere. Over a random part of C sequences the mean
    of <result, dw/dphi> is exactly that of all B: sum_i dw_i = 0, and the factor makes up for what centring takes.

    Args:
        standard_C: alignments, centred over the part, shape (C,), C >= 2 (or C = B).
        positions_C: their places in the batch, shape (C,).
        size: B.

    Returns:
        Shape (B,).
    """
    factor = 1.0 if len(standard_C) == size else (size - 1) / (len(standard_C) - 1)
    return standard_C.new_zeros(size).index_put((positions_C,), factor * standard_C)
