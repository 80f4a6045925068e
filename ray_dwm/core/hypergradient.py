"""The chain rule through one optimizer step, in closed form (BILEVEL derivation in docs/bilevel.md).

Lower level: g = sum_i w_i grad l_i(theta); g_c = clip(g); theta' = theta - lr * U(g_c; state) - lr * wd * theta.
Upper level: L_target(theta'). With v = grad L_target(theta'), the alignments are
a_i = dL_target/dw_i = -lr <u, grad l_i(theta)> with u = C^T (D * v): D the elementwise derivative of U,
C the Jacobian of the clipping. No second-order autograd is needed.

All functions work on one parameter (or one shard of one) at a time; inner products that need every
shard are handed in as scalars, so the mathematics knows nothing of how parameters are distributed.
"""

from __future__ import annotations

from torch import Tensor


def sgd_jacobian(momentum: float, dampening: float, nesterov: bool, first_step: bool) -> float:
    """D of torch.optim.SGD: d(update)/d(gradient), a scalar.

    The first step initialises the momentum buffer with the gradient itself, undamped.
    """
    if momentum == 0.0:
        return 1.0
    buffer = 1.0 if first_step else 1.0 - dampening
    return 1.0 + momentum * buffer if nesterov else buffer


def adamw_jacobian(
    clipped_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """D of torch.optim.AdamW: derivative of mh / (sqrt(vh) + eps) in the gradient, elementwise.

    Args:
        clipped_grad: the gradient that the optimizer was given.
        exp_avg, exp_avg_sq: moments AFTER the step, not bias-corrected (as the optimizer stores them).
        step: number of steps taken, this one included; at step 1 Adam is sign-like and D is close to 0.

    Returns:
        D, shaped like the gradient. It is 0 where the gradient is exactly 0: no sample of this batch has a
        gradient there, so the entry cannot contribute to any alignment, but its 1/eps could swamp the norm
        of u, to which finite differences scale their perturbation.
    """
    c1 = (1 - beta1) / (1 - beta1**step)
    c2 = (1 - beta2) / (1 - beta2**step)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt_()
    denominator = root + eps
    # (c1 - (mh / denominator) (c2 g / root)) / denominator, in place: these are tensors of the LM's size. Factors of
    # moderate size: root * denominator^2 would underflow in fp32.
    jacobian = (exp_avg / (1 - beta1**step)).div_(denominator).mul_(clipped_grad / root).mul_(-c2).add_(c1)
    return jacobian.div_(denominator).masked_fill_((clipped_grad == 0) | (root == 0), 0.0)  # root: g^2 can underflow


def adamw_gain(exp_avg_sq: Tensor, step: int, beta1: float, beta2: float, eps: float) -> Tensor:
    """The part of D that is known before a step's gradient is: c1 / (sqrt(vh) + eps), with the last second moment.

    Args:
        exp_avg_sq: second moment BEFORE the step, not bias-corrected.
        step: number of steps taken before it, at least 1.

    Returns:
        D without its second term, shaped like the parameter; 0 where no gradient has been seen.
    """
    root = (exp_avg_sq / (1 - beta2**step)).sqrt()
    return ((1 - beta1) / (1 - beta1 ** (step + 1)) / (root + eps)).masked_fill(root == 0, 0.0)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """The factor that torch.nn.utils.clip_grad_norm_ applies: min(1, max_norm / (norm + 1e-6))."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def clip_transpose(direction: Tensor, grad: Tensor, dot: float, norm: float, max_norm: float) -> Tensor:
    """C^T applied to a direction, where g_c = max_norm g / (n + 1e-6) and n = |g| > max_norm.

    C = k (I - g g^T / (n (n + 1e-6))) with k = max_norm / (n + 1e-6): symmetric, so C^T = C.

    Args:
        direction: D * v, one parameter's part.
        grad: the UNCLIPPED gradient g, the same part.
        dot: <g, D * v> over all parameters and shards.
        norm: |g| over all parameters and shards.
        max_norm: the clipping threshold; 0 or negative means no clipping.
    """
    coefficient = clip_coefficient(norm, max_norm)
    if coefficient == 1.0:
        return direction
    return coefficient * (direction - grad * (dot / (norm * (norm + 1e-6))))
