"""Baselines against values derived by hand, optimality conditions and an independent optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_dwm.core.reweighting import (
    LOSS_STRATEGIES,
    anchor_alignment,
    annealed_r,
    entropy_matched_random_weights,
    joint_update_aware_weights,
    loss_based_weights,
    shuffled,
)
from ray_dwm.core.weighting import kl_to_uniform

E, E15, E2 = 2.718281828459045, 4.4816890703380645, 7.38905609893065  # e^1, e^1.5, e^2


def close(actual: Tensor, expected: Tensor | list[float] | list[list[float]], atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0.0, atol=atol)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Losses 1, 2, 3, 5: the mid-range is 3 and half the range 2, so h = (l - 3) / 2 = -1, -1/2, 0, 1. With r = 1/2 the
# weights are proportional to exp(2 f):
@pytest.mark.parametrize(
    ("strategy", "relative"),
    [
        ("linupper", [1.0, E, E2, E2]),  # f = min(h + 1, 1) = 0, 1/2, 1, 1
        ("quadratic", [1.0, E15, E2, 1.0]),  # f = 1 - h^2 = 0, 3/4, 1, 0
        ("extremes", [E2, E, 1.0, E2]),  # f = |h| = 1, 1/2, 0, 1
    ],
)
def test_loss_based_weights_by_hand(strategy: str, relative: list[float]) -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    expected = torch.tensor(relative, dtype=torch.float64) / sum(relative)
    close(loss_based_weights(losses, strategy, 0.5), expected)
    close(loss_based_weights(losses.float(), strategy, 0.5), expected, atol=1e-6)


# What each strategy makes of eleven losses spread evenly over the range (the mid-range is number 5).
@pytest.mark.parametrize(
    ("strategy", "rising", "falling", "flat"),
    [
        ("linupper", range(5), range(0), range(5, 10)),
        ("quadratic", range(5), range(5, 10), range(0)),
        ("extremes", range(5, 10), range(5), range(0)),
    ],
)
def test_order_of_loss_based_weights(strategy: str, rising: range, falling: range, flat: range) -> None:
    slope = loss_based_weights(torch.linspace(2.0, 4.0, 11, dtype=torch.float64), strategy, 0.4).diff()
    assert all(slope[i] > 1e-3 for i in rising)
    assert all(slope[i] < -1e-3 for i in falling)
    assert all(abs(slope[i]) < 1e-12 for i in flat)


@pytest.mark.parametrize("strategy", LOSS_STRATEGIES)
def test_loss_based_weights_have_no_units_and_a_bounded_ratio(strategy: str) -> None:
    losses = torch.randn(64, dtype=torch.float64, generator=seeded(0))
    weights = loss_based_weights(losses, strategy, 0.4)
    assert float(weights.sum()) == pytest.approx(1.0)
    close(loss_based_weights(0.01 * losses + 7.0, strategy, 0.4), weights)
    assert float(weights.max() / weights.min()) <= math.exp(1 / 0.4) * (1 + 1e-12)
    order = torch.randperm(64, generator=seeded(1))
    close(loss_based_weights(losses[order], strategy, 0.4), weights[order], atol=1e-15)


@pytest.mark.parametrize("strategy", LOSS_STRATEGIES)
def test_loss_based_weights_that_are_uniform(strategy: str) -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])
    uniform = torch.full((4,), 0.25)
    assert torch.equal(loss_based_weights(losses, strategy, math.inf), uniform)
    close(loss_based_weights(losses, strategy, 1e6), uniform, atol=1e-6)
    assert torch.equal(loss_based_weights(torch.full((4,), 2.7), strategy, 0.1), uniform)
    assert torch.equal(loss_based_weights(torch.tensor([2.7]), strategy, 0.1), torch.ones(1))


@pytest.mark.parametrize(
    ("step", "r_start", "anneal_steps", "expected"),
    [
        (0, math.inf, 0, math.inf),
        (9, math.inf, 0, math.inf),
        (10, math.inf, 0, 0.4),
        (9, 2.0, 4, 2.0),
        (10, 2.0, 4, 2.0),
        (12, 2.0, 4, 2 / 3),  # half-way between 1/2 and 1/0.4 = 2.5: 1/r = 1.5
        (14, 2.0, 4, 0.4),
        (10, math.inf, 4, math.inf),
        (12, math.inf, 4, 0.8),  # half-way between 0 and 2.5: 1/r = 1.25
        (99, math.inf, 4, 0.4),
    ],
)
def test_annealed_r(step: int, r_start: float, anneal_steps: int, expected: float) -> None:
    r = annealed_r(step, warmup_steps=10, r_final=0.4, r_start=r_start, anneal_steps=anneal_steps)
    assert r == pytest.approx(expected)


def test_anchor_alignment_by_hand() -> None:
    # Unit vectors (0.6, 0.8), (0, 1), (1, 0), the zero vector; the anchor is the second axis.
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    s, gram = anchor_alignment(embeddings, torch.tensor([0.0, 7.0], dtype=torch.float64))
    close(s, [0.8, 1.0, 0.0, 0.0])
    close(gram, [[1.0, 0.8, 0.6, 0.0], [0.8, 1.0, 0.0, 0.0], [0.6, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def cosines(size: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Alignment and Gram matrix of random embeddings that share a common direction."""
    embeddings = torch.randn(size, width, dtype=torch.float64, generator=seeded(seed)) + 0.5
    return anchor_alignment(embeddings, torch.randn(width, dtype=torch.float64, generator=seeded(seed + 1)))


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_without_redundancy_the_weights_are_a_softmax(damping: float) -> None:
    s, gram = cosines(16, 8, 0)
    close(joint_update_aware_weights(s, gram, beta=0.0, tau=0.05, damping=damping), torch.softmax(s / 0.05, 0))


# Two samples of cosine c, w = (x, 1 - x). dF/dx = 0 reads s1 - s2 - beta (1 - c) (2 x - 1) = tau log(x / (1 - x)),
# which gives the difference in alignment that makes x the optimum.
@pytest.mark.parametrize("x", [0.02, 0.4, 0.75])
@pytest.mark.parametrize(("beta", "tau", "c"), [(0.1, 0.05, 0.3), (2.0, 0.5, 0.5), (5.0, 0.05, -1.0), (5.0, 0.05, 1.0)])
def test_two_samples_by_hand(x: float, beta: float, tau: float, c: float) -> None:
    difference = tau * math.log(x / (1 - x)) + beta * (1 - c) * (2 * x - 1)
    s = torch.tensor([0.1 + difference, 0.1], dtype=torch.float64)
    gram = torch.tensor([[1.0, c], [c, 1.0]], dtype=torch.float64)
    close(joint_update_aware_weights(s, gram, beta, tau, iterations=10_000), [x, 1 - x], atol=1e-8)


def test_duplicates_lose_weight() -> None:
    # Samples 1 and 2 are the same, 3 is orthogonal; w = (a, a, 1 - 2a). S w = (2a, 2a, 1 - 2a), so the fixed point
    # reads log(a / (1 - 2a)) = -(beta / tau) (4a - 1). a = 0.3: log(3/4) = -0.2 beta / tau.
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    s = torch.full((3,), 0.7, dtype=torch.float64)
    close(joint_update_aware_weights(s, gram, beta=5 * math.log(4 / 3) * 0.2, tau=0.2), [0.3, 0.3, 0.4])


HARD = (10.0, 0.05)  # beta / tau = 200: the undamped iteration cycles


@pytest.mark.parametrize("damping", [1.0, 0.5, 0.05])
@pytest.mark.parametrize(("beta", "tau"), [(0.1, 0.05), (1.0, 0.05), (1.0, 1.0), HARD])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_optimality_conditions(beta: float, tau: float, damping: float, seed: int) -> None:
    """KKT: on the simplex's interior, the gradient s - beta S w - tau (log w + 1) is the same for all samples."""
    s, gram = cosines(32, 4, seed)
    w = joint_update_aware_weights(s, gram, beta, tau, 10_000, damping)
    gradient = s - beta * gram @ w - tau * (w.log() + 1)
    assert float(gradient.max() - gradient.min()) < 1e-8
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
    order = torch.randperm(32, generator=seeded(9))
    close(joint_update_aware_weights(s[order], gram[order][:, order], beta, tau, 10_000, damping), w[order])


def undamped(s: Tensor, gram: Tensor, beta: float, tau: float, iterations: int) -> Tensor:
    w = torch.full_like(s, 1 / s.numel())
    for _ in range(iterations):
        w = torch.softmax((s - beta * gram @ w) / tau, 0)
    return w


def test_five_iterations_are_dataflex_and_damping_is_needed_beyond_its_defaults() -> None:
    s, gram = cosines(32, 4, 0)
    close(joint_update_aware_weights(s, gram, iterations=5), undamped(s, gram, 0.1, 0.05, 5), atol=1e-14)
    late, later = undamped(s, gram, *HARD, 1000), undamped(s, gram, *HARD, 1001)
    assert float((late - later).abs().sum()) > 0.1


@pytest.mark.parametrize(("beta", "tau"), [(0.1, 0.05), (1.0, 0.2)])
def test_agrees_with_mirror_ascent(beta: float, tau: float) -> None:
    """Exponentiated-gradient ascent on F by autograd: a different algorithm for the same maximum."""
    s, gram = cosines(8, 4, 3)
    w = torch.full((8,), 1 / 8, dtype=torch.float64)
    for _ in range(3000):
        v = w.clone().requires_grad_()
        objective = s @ v - beta / 2 * v @ gram @ v - tau * (v * v.log()).sum()
        (gradient,) = torch.autograd.grad(objective, v)
        w = torch.softmax(w.log() + 0.5 * gradient, 0)
    close(joint_update_aware_weights(s, gram, beta, tau), w)
    close(joint_update_aware_weights(s.float(), gram.float(), beta, tau), w, atol=1e-5)


def test_high_temperature_is_uniform() -> None:
    s, gram = cosines(16, 4, 0)
    close(joint_update_aware_weights(s, gram, beta=1.0, tau=1e7), torch.full((16,), 1 / 16), atol=1e-8)


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.999])
def test_random_weights_meet_the_divergence(size: int, share: float) -> None:
    target = share * math.log(size)
    w = entropy_matched_random_weights(target, size, seeded(0))
    assert w.shape == (size,) and float(w.min()) >= 0.0
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(kl_to_uniform(w)) == pytest.approx(target, abs=1e-6, rel=0)
    assert torch.equal(w, entropy_matched_random_weights(target, size, seeded(0)))
    other = entropy_matched_random_weights(target, size, seeded(1))
    assert not torch.allclose(w, other, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_random_weights_without_divergence_are_uniform(size: int) -> None:
    generator, reference = seeded(0), seeded(0)
    w = entropy_matched_random_weights(0.0, size, generator)
    assert torch.equal(w, torch.full((size,), 1 / size, dtype=torch.float64))
    torch.randn(size, dtype=torch.float64, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())  # the stream does not depend on the target


def test_random_weights_favour_nobody() -> None:
    generator = seeded(0)
    mean = torch.stack([entropy_matched_random_weights(0.3, 4, generator) for _ in range(400)]).mean(0)
    close(mean, torch.full((4,), 0.25), atol=0.05)  # five standard errors


def test_shuffled_keeps_the_weights_and_moves_them() -> None:
    w = torch.arange(64.0) / torch.arange(64.0).sum()
    moved = shuffled(w, seeded(0))
    assert torch.equal(moved.sort().values, w)
    assert not torch.equal(moved, w)
    assert torch.equal(moved, shuffled(w, seeded(0)))
    assert not torch.equal(moved, shuffled(w, seeded(1)))


TWO = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: loss_based_weights(TWO, "uniform", 1.0),
        lambda: loss_based_weights(TWO, "linupper", 0.0),
        lambda: loss_based_weights(TWO, "linupper", math.nan),
        lambda: annealed_r(0, warmup_steps=1, r_final=0.0),
        lambda: annealed_r(0, warmup_steps=1, r_final=1.0, r_start=-1.0),
        lambda: joint_update_aware_weights(TWO, torch.eye(2), beta=-0.1),
        lambda: joint_update_aware_weights(TWO, torch.eye(2), tau=0.0),
        lambda: joint_update_aware_weights(TWO, torch.eye(2), damping=0.0),
        lambda: joint_update_aware_weights(TWO, torch.eye(2), damping=1.1),
        lambda: entropy_matched_random_weights(-0.1, 4, seeded(0)),
        lambda: entropy_matched_random_weights(math.log(4), 4, seeded(0)),
        lambda: entropy_matched_random_weights(math.nan, 4, seeded(0)),
        lambda: entropy_matched_random_weights(0.1, 1, seeded(0)),
    ],
)
def test_bad_arguments(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|need"):
        call()
