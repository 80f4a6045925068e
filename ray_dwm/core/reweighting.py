"""Online data-weighting baselines and null controls that a learned Data Weighting Model is compared with.

Every rule returns relative weights of a whole global batch: shape (B,), sum 1, uniform is 1/B. Inputs are
detached. Legend: B = sequences in the global optimizer batch, D = embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ray_dwm.core.weighting import kl_to_uniform

# Preference of a sample as a function of its loss h in [-1, 1]: -1 the lowest of the batch, 1 the highest.
LOSS_STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h_B: (h_B + 1.0).clamp(max=1.0),  # easy samples count less; flat from the mid-range up
    "quadratic": lambda h_B: 1.0 - h_B.square(),  # medium losses count most
    "extremes": torch.abs,  # lowest and highest losses count most
}


def loss_based_weights(losses_B: Tensor, strategy: str, r: float) -> Tensor:
    """Weights from the losses alone: w = softmax(f(h) / r), h = the losses scaled linearly to [-1, 1].

    Sow et al., Dynamic Loss-Based Sample Reweighting (ICLR 2025, arXiv 2502.06733), as in the authors' code
    (sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025, delta = 1; "quadratic" is called "mid" there). Minimum
    and maximum are those of this batch, so the weights do not change when losses are shifted or scaled, and
    the largest weight is at most exp(1 / r) times the smallest. The authors' GPT-2 runs use r = 0.4 or 1.

    Args:
        losses_B: loss of each sequence, nats per token, shape (B,).
        strategy: a key of `LOSS_STRATEGIES`.
        r: temperature, > 0; larger is closer to uniform, infinity is exactly uniform.

    Raises:
        ValueError: for an unknown strategy or r <= 0.
    """
    if strategy not in LOSS_STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(LOSS_STRATEGIES)}")
    if not r > 0.0:
        raise ValueError(f"r is {r}; it must be > 0")
    low, high = losses_B.min(), losses_B.max()
    # Centred first: equal losses give h = 0 for all. Losses closer than 1e-6 are not spread out to [-1, 1].
    h_B = (losses_B - 0.5 * (low + high)) * (2.0 / (high - low).clamp(min=1e-6))
    return torch.softmax(LOSS_STRATEGIES[strategy](h_B) / r, dim=0)


def annealed_r(
    step: int, *, warmup_steps: int, r_final: float, r_start: float = math.inf, anneal_steps: int = 0
) -> float:
    """Temperature of `loss_based_weights` at LM step `step` (from 0): `r_start` in the warm-up, then `r_final`.

    The defaults are the schedule of Sow et al.'s code: uniform weights for `burnout_steps` (1000 of 20000),
    then a constant r. With `anneal_steps` the change is gradual: 1/r, the strength of the preference, grows
    linearly, which is defined for r_start = infinity too.

    Raises:
        ValueError: if a temperature is not > 0.
    """
    if not (r_final > 0.0 and r_start > 0.0):
        raise ValueError(f"r_start is {r_start} and r_final is {r_final}; both must be > 0")
    if step < warmup_steps:
        return r_start
    if step >= warmup_steps + anneal_steps:
        return r_final
    progress = (step - warmup_steps) / anneal_steps
    strength = (1.0 - progress) / r_start + progress / r_final
    return 1.0 / strength if strength else math.inf


def anchor_alignment(embeddings_BD: Tensor, anchor_D: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the samples with an anchor and with one another, for `joint_update_aware_weights`.

    As in DataFlex 1.1.0, where the anchor is the mean of the target set's embeddings, normalised after the mean.

    Args:
        embeddings_BD: one embedding per sequence, not normalised, shape (B, D).
        anchor_D: mean embedding of the target (anchor) set, not normalised, shape (D,).

    Returns:
        (alignment s of shape (B,), Gram matrix S of shape (B, B)), in [-1, 1]; zero for zero vectors.
    """
    unit_BD = normalize(embeddings_BD, dim=1)
    return unit_BD @ normalize(anchor_D, dim=0), unit_BD @ unit_BD.T


def joint_update_aware_weights(
    alignment_B: Tensor,
    gram_BB: Tensor,
    beta: float = 0.1,
    tau: float = 0.05,
    iterations: int = 1000,
    damping: float = 1.0,
    tolerance: float = 1e-10,
) -> Tensor:
    """The weights that maximise F(w) = s'w - (beta / 2) w'Sw + tau H(w) over the simplex, H = entropy in nats.

    DataFlex's `joint_update_aware` (OpenDCAI/DataFlex 1.1.0): samples that point to the anchor gain weight,
    samples that repeat one another lose it. For positive semi-definite S, F is strictly concave and its maximum
    is the only fixed point of T(w) = softmax((s - beta S w) / tau); the iteration is w <- w + d (T(w) - w) from
    uniform. beta, tau and damping default to DataFlex's, which takes 5 undamped iterations, converged or not.

    Undamped, the iteration can cycle when beta / tau is large. So d is halved whenever the residual does not
    fall as it should, down to a d that always converges: T(w) maximises F with its quadratic part linearised, so
    dF >= d tau KL(w || T(w)) - d^2 (beta / 2) v'Sv with v = T(w) - w, and by Pinsker v'Sv <= 2 max|S| KL(w || T(w)).
    Hence F rises for d < tau / (beta max|S|); at half of that, the gap to the maximum shrinks by 1 - d / 2 a step.

    Args:
        alignment_B: s, gain of each sample, not standardised, shape (B,).
        gram_BB: S, symmetric and positive semi-definite, shape (B, B).
        beta: strength of the penalty on redundancy, >= 0; in units of s over those of S.
        tau: temperature, > 0, in units of s; larger is closer to uniform.
        iterations: most iterations; the last iterate is returned even if it has not converged. At the default
            beta, tau and damping about ten are needed; tens at beta / tau = 20, up to thousands at 200.
        damping: d of the first iterations, in (0, 1]; 1 is undamped.
        tolerance: converged when the sum of |T(w) - w| is at most this.

    Returns:
        Weights of shape (B,) in the dtype of `alignment_B`; computed in fp64.

    Raises:
        ValueError: if beta, tau or damping is out of range.
    """
    if not (beta >= 0.0 and tau > 0.0 and 0.0 < damping <= 1.0):
        raise ValueError(f"beta={beta}, tau={tau}, damping={damping}; need beta >= 0, tau > 0, 0 < damping <= 1")
    s_B, gram_BB = alignment_B.double(), gram_BB.double()
    curvature = beta * float(gram_BB.abs().max())
    smallest = min(damping, tau / (2.0 * curvature)) if curvature else damping
    weights_B = torch.full_like(s_B, 1.0 / s_B.numel())
    previous = math.inf
    for _ in range(iterations):
        move_B = torch.softmax((s_B - beta * (gram_BB @ weights_B)) / tau, dim=0) - weights_B
        residual = float(move_B.abs().sum())
        if residual <= tolerance:  # T(w) rather than w: tiny weights are right to many digits there too
            return (weights_B + move_B).to(alignment_B.dtype)
        if residual > (1.0 - damping / 2.0) * previous:  # a d that does not overshoot gives 1 - d or less
            damping = max(smallest, damping / 2.0)
        weights_B = weights_B + damping * move_B
        previous = residual
    return weights_B.to(alignment_B.dtype)


def entropy_matched_random_weights(target_kl: float, size: int, generator: torch.Generator) -> Tensor:
    """Null control: random weights as far from uniform as given ones, but blind to the data.

    w = softmax(c z) with z standard normal; KL(w || uniform) rises with c from 0 to log B (its derivative is c
    times the variance of z under w), so bisection finds the c that meets the target.

    Args:
        target_kl: KL(w || uniform) to meet, in nats, in [0, log size); 0 gives exactly uniform weights.
        size: B.
        generator: source of z; advanced by `size` normal draws whatever the target. Its device is the result's.

    Returns:
        Weights of shape (B,) in fp64, whose `kl_to_uniform` is the target to 1e-6.

    Raises:
        ValueError: if the target is out of range.
    """
    if not (target_kl == 0.0 or 0.0 < target_kl < math.log(size)):
        raise ValueError(f"target_kl is {target_kl}; it must be in [0, log {size})")
    z_B = torch.randn(size, dtype=torch.float64, generator=generator, device=generator.device)
    low, high = 0.0, 1.0 if target_kl else 0.0
    while float(kl_to_uniform(torch.softmax(high * z_B, dim=0))) < target_kl:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = float(kl_to_uniform(torch.softmax(middle * z_B, dim=0))) < target_kl
        low, high = (middle, high) if below else (low, middle)
    return torch.softmax(high * z_B, dim=0)


def shuffled(weights_B: Tensor, generator: torch.Generator) -> Tensor:
    """Null control: the given weights dealt out to the samples at random, shape (B,)."""
    order_B = torch.randperm(weights_B.numel(), generator=generator, device=generator.device)
    return weights_B[order_B.to(weights_B.device)]
