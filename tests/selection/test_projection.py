"""Random projections: signs that a seed names, inner products kept as theory says, and the published package's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dwm.selection.projection import factors, project, signs

CPU = torch.device("cpu")


def splitmix64(state: int) -> int:
    """The published generator's output for one state, in Python's whole numbers."""
    x = state % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_signs_are_the_bits_of_splitmix64() -> None:
    """0xE220A8397B1DCDAF is the first output for seed 0, as in the reference implementation's test vectors."""
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((splitmix64(3 + golden) ^ 5) + golden)
    words = [splitmix64(place * golden + key) for place in range(4)]
    expected = [[1.0 if word >> bit & 1 else -1.0 for bit in range(64)] for word in words]
    assert signs(3, 5, 0, 4, 64, CPU).tolist() == expected
    assert signs(3, 5, 1, 1, 128, CPU).tolist() == [expected[2] + expected[3]]


def test_any_part_of_a_matrix_can_be_made_alone() -> None:
    whole = signs(1, 2, 0, 40, 192, CPU)
    assert torch.equal(signs(1, 2, 17, 5, 192, CPU), whole[17:22])
    assert torch.equal(signs(1, 2, 0, 40, 130, CPU), whole[:, :130])
    for other in (signs(0, 2, 0, 40, 192, CPU), signs(1, 3, 0, 40, 192, CPU)):
        assert abs(float((other * whole).mean())) < 5 / math.sqrt(whole.numel())


def test_signs_are_balanced_and_uncorrelated() -> None:
    matrix = signs(0, 0, 0, 20_000, 128, CPU)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    for axis in (0, 1):
        means = matrix.mean(dim=axis) * math.sqrt(matrix.shape[axis])
        # Standard normal, and so not too even either.
        assert abs(float(means.square().mean()) - 1) < 4 * math.sqrt(2 / len(means))
    correlations = (matrix.T @ matrix / math.sqrt(len(matrix))).fill_diagonal_(0)
    assert 0.95 < float(correlations.square().sum()) / (128 * 127) < 1.05
    assert float(correlations.abs().max()) < 5.5


def vectors(size: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator)
    return x, 0.6 * x + 0.8 * torch.randn(size, generator=generator)


def test_projection_keeps_inner_products_as_theory_says() -> None:
    """Mean and variance over seeds, of a product and of a norm."""
    x, y = vectors()
    k, found = 64, []
    for seed in range(4000):
        px, py = project([torch.stack([x, y])], k, seed)
        found.append([float(px @ py), float(px @ px)])
    for values, left, right in zip(np.array(found).T, (x, x), (y, x), strict=True):
        exact = float(left @ right)
        rest = 2 * float((left.square() * right.square()).sum())
        variance = (float(left @ left) * float(right @ right) + exact**2 - rest) / k
        assert abs(values.mean() - exact) < 4 * math.sqrt(variance / len(values))
        assert values.var() == pytest.approx(variance, rel=0.1)  # its own error is 2 %


def test_factored_projection_keeps_inner_products_in_expectation() -> None:
    """Of matrices of rank 1 and of full rank; the variance of the former is what limits a factored projection."""
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(6, 9, generator=generator) for _ in range(2)]
    single = [torch.outer(torch.randn(6, generator=generator), torch.randn(9, generator=generator)) for _ in range(2)]
    for x, y in (full, single, (full[0], single[0])):
        products = []
        for seed in range(4000):
            left, right = factors(seed, 0, x.shape, 8, CPU)
            products.append(float(((left.T @ x @ right) * (left.T @ y @ right)).sum()))
        error = np.std(products) / math.sqrt(len(products))
        assert abs(np.mean(products) - float((x * y).sum())) < 4 * error
        assert error < 0.02 * float(x.norm() * y.norm())


def test_sides_of_all_matrices_are_independent() -> None:
    sides = [side for index in range(3) for side in factors(0, index, torch.Size((500, 500)), 16, CPU)]
    for i, one in enumerate(sides):
        for other in sides[:i]:
            assert abs(float((one * other).sum()) * 16) < 5 * math.sqrt(500 * 16)


@pytest.mark.parametrize("block", [1, 640, 2**20])
def test_projection_is_the_same_in_blocks_and_parts(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 301, generator=generator)
    matrix = signs(7, 0, 0, 301, 128, CPU) / math.sqrt(128)
    parts = [gradients[:, :100].reshape(5, 10, 10), gradients[:, 100:]]
    assert torch.allclose(project(parts, 128, 7, block), gradients @ matrix, atol=1e-5)
    assert torch.allclose(project([parts[0][:2], parts[1][:2]], 128, 7), gradients[:2] @ matrix, atol=1e-5)


def test_inner_products_agree_with_the_published_projector() -> None:
    """Both are within the error of a projection; traker's are too large by k, for its matrix is not normalised."""
    projectors = pytest.importorskip("trak.projectors", reason="traker (extra `oracle`) is not installed")
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2000, generator=generator)
    gradients = common + torch.randn(12, 2000, generator=generator)
    k = 2048
    theirs = projectors.BasicProjector(2000, k, 0, projectors.ProjectionType.normal, CPU).project(gradients, 0)
    ours = project([gradients], k, 0)
    norms = gradients.norm(dim=1)
    scale = torch.outer(norms, norms)
    exact, of_theirs, of_ours = (x @ x.T / scale for x in (gradients, theirs / math.sqrt(k), ours))
    for found in (of_theirs, of_ours):
        assert float((found - exact).square().mean().sqrt()) < 1.5 / math.sqrt(k) * 1.2
    assert float((of_ours - of_theirs).square().mean().sqrt()) < 1.5 / math.sqrt(k) * 1.2 * math.sqrt(2)
    assert float(exact.min()) > 0.4  # so that the errors are small beside what they are errors of
