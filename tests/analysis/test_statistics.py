"""Known answers: tables of Student's t, examples worked by hand, and published ones."""

from __future__ import annotations

import math

import pytest

from ray_dwm.analysis.statistics import holm, interval, paired, ratio, read_at, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Two-sided 95 %, from any printed table.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_t(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_cdf(quantile, freedom) == pytest.approx(0.975, abs=5e-6)
    assert t_cdf(-quantile, freedom) == pytest.approx(0.025, abs=5e-6)
    assert t_cdf(0.0, freedom) == 0.5


@pytest.mark.parametrize("t", [-2.5, -0.3, 0.7, 4.0])
def test_one_and_two_degrees_of_freedom_have_simple_forms(t: float) -> None:
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_interval_of_three_values() -> None:
    found = interval([1.0, 2.0, 3.0])  # deviation 1, so 4.3027 / sqrt(3) on either side
    assert (found.n, found.mean) == (3, 2.0)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    assert found.low == pytest.approx(-0.4841, abs=1e-4)
    assert found.excludes(5.0) and not found.excludes(0.0)


def test_one_value_has_no_interval() -> None:
    found = interval([1.5])
    assert (found.mean, found.low, found.high, found.half) == (1.5, None, None, None)
    assert not found.excludes(100.0)
    alone = paired([1.5])
    assert alone.p_t is None and alone.p_signs == 1.0


def test_ratios_are_taken_on_logarithms() -> None:
    found = ratio([0.5, 1.0, 2.0])
    assert found.mean == pytest.approx(1.0)
    half = 4.30265 * math.log(2) / math.sqrt(3)
    assert (found.low, found.high) == (
        pytest.approx(math.exp(-half), rel=1e-5),
        pytest.approx(math.exp(half), rel=1e-5),
    )


def test_paired_t_on_students_own_sleep_data() -> None:
    # Student 1908, the additional hours of sleep of ten patients by two drugs: t = 4.0621, p = 0.002833.
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = paired(differences)
    assert found.interval.mean == pytest.approx(1.58)
    assert (found.interval.low, found.interval.high) == (
        pytest.approx(0.7001, abs=1e-4),
        pytest.approx(2.4599, abs=1e-4),
    )
    assert found.p_t == pytest.approx(0.002833, abs=1e-6)
    # Nine differ from 0, all upwards: only all signs alike are as extreme, whatever the tenth's.
    assert found.p_signs == pytest.approx(2 / 2**9)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([-0.1, -0.2, -0.3], 2 / 8),  # all the same way: the smallest that three can give
        ([1.0, 2.0, -3.0], 8 / 8),  # a sum of 0: nothing is less extreme
        ([1.0, 1.0, 1.0, -1.0], 10 / 16),  # |sum| 2: all but the six whose sum is 0
    ],
)
def test_sign_flips_are_counted(differences: list[float], p: float) -> None:
    assert paired(differences).p_signs == pytest.approx(p)


def test_differences_without_spread() -> None:
    assert paired([0.0, 0.0, 0.0]).p_t == 1.0
    assert paired([0.5, 0.5, 0.5]).p_t == 0.0


def test_holm_as_worked_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last must not fall below the third.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == {
        "d": pytest.approx(0.02),
        "a": pytest.approx(0.03),
        "c": pytest.approx(0.06),
        "b": pytest.approx(0.06),
    }
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(("at", "value"), [(-1.0, 4.0), (0.0, 4.0), (5.0, 3.0), (10.0, 2.0), (15.0, 1.5), (99.0, 1.0)])
def test_a_curve_is_read_between_its_points(at: float, value: float) -> None:
    assert read_at([0.0, 10.0, 20.0], [4.0, 2.0, 1.0], at) == pytest.approx(value)
