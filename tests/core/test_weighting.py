"""Weights, regularisers and the gradient of the upper objective."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ray_dwm.core.weighting import (
    effective_sample_size,
    kl_to_uniform,
    normalised_entropy,
    score_gradient,
    standardise,
    upper_objective,
    weights_from_scores,
    whole_batch,
)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_equal_scores_are_exactly_uniform(size: int, floor: float) -> None:
    assert torch.equal(weights_from_scores(torch.zeros(size), floor=floor), torch.full((size,), 1 / size))


def test_floor_bounds_the_smallest_weight() -> None:
    weights = weights_from_scores(torch.tensor([50.0, 0.0, 0.0, 0.0]), floor=0.2)
    assert weights.min() == pytest.approx(0.05)
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "ess", "entropy", "kl"),
    [
        ([0.25] * 4, 4.0, 1.0, 0.0),
        ([1.0, 0.0, 0.0, 0.0], 1.0, 0.0, math.log(4)),
        ([0.5, 0.5, 0.0, 0.0], 2.0, 0.5, math.log(2)),
    ],
)
def test_collapse_measures(weights: list[float], ess: float, entropy: float, kl: float) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    assert float(effective_sample_size(w)) == pytest.approx(ess)
    assert float(normalised_entropy(w)) == pytest.approx(entropy)
    assert float(kl_to_uniform(w)) == pytest.approx(kl)


@pytest.mark.parametrize(("temperature", "floor", "kl"), [(1.0, 0.0, 0.0), (0.5, 0.0, 0.3), (2.0, 0.2, 0.7)])
def test_score_gradient_equals_autograd(temperature: float, floor: float, kl: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    a = torch.randn(6, dtype=torch.float64, generator=generator)
    upper_objective(weights_from_scores(z, temperature, floor), a, kl).backward()
    closed = score_gradient(z.detach(), a, kl, temperature, floor)
    torch.testing.assert_close(z.grad, closed, rtol=1e-12, atol=1e-14)


def test_standardised_alignments_have_no_units() -> None:
    a = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    small, _ = standardise(a * 1e-6, 0.0, 0.9)
    large, variance = standardise(a * 1e3, 0.0, 0.9)
    torch.testing.assert_close(small, large)
    assert float(large.var()) == pytest.approx(1.0)
    _, after = standardise(a * 0, variance, 0.9)
    assert after == pytest.approx(0.9 * variance)


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_underflow_have_a_finite_gradient(kl: float, dtype: torch.dtype) -> None:
    z = torch.tensor([900.0, 0.0, 1.0, 2.0], dtype=dtype, requires_grad=True)
    a = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype)
    weights = weights_from_scores(z)
    assert weights[1] == 0.0
    upper_objective(weights, a, kl).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
    torch.testing.assert_close(score_gradient(z.detach(), a, kl, 1.0, 0.0), z.grad)


@pytest.mark.parametrize(("kl", "share"), [(0.1, 0.02), (1.0, 0.43)])
def test_effective_sample_size_at_the_optimum(kl: float, share: float) -> None:
    """What docs/bilevel.md says of a DWM that predicts standard normal alignments of 64 sequences."""
    a = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    sizes = torch.stack([effective_sample_size(torch.softmax(-row / kl, 0)) for row in a])
    assert float(sizes.mean()) / 64 == pytest.approx(share, abs=0.01)


def test_tiny_alignments_are_standardised_too() -> None:
    scaled, _ = standardise(torch.tensor([1.0, 2.0, 4.0]) * 1e-24, 0.0, 0.9)
    assert float(scaled.var()) == pytest.approx(1.0)


@pytest.mark.parametrize("part", [2, 3, 5])
def test_a_random_part_of_the_batch_stands_for_all_of_it(part: int) -> None:
    """Over all parts of C sequences, the mean phi-gradient is that of the whole batch: exactly, not nearly."""
    generator = torch.Generator().manual_seed(0)
    scores, alignments = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(weights_from_scores, scores)
    gradients = []
    for chosen in itertools.combinations(range(5), part):
        positions = torch.tensor(chosen)
        centred = alignments[positions] - alignments[positions].mean()
        gradients.append(whole_batch(centred, positions, 5) @ slope)
    torch.testing.assert_close(torch.stack(gradients).mean(0), alignments @ slope, rtol=1e-12, atol=1e-14)
