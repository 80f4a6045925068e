"""The influence model: a planted function is found, by what was held out, and the same way every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_dwm.config import build
from ray_dwm.config.selection import MatesConfig
from ray_dwm.data.shards import Rows
from ray_dwm.errors import DataError
from ray_dwm.selection.influence import Fit, Influence, explained, spearman, standardised

VOCAB, T = 64, 24


def rows(count: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    lows = rng.integers(1, VOCAB // 2, size=count)  # sequences differ in which tokens they use
    ids = rng.integers(0, lows[:, None] + VOCAB // 2, size=(count, T)).astype(np.uint16)
    return Rows(np.arange(count), np.zeros(count, dtype=np.int32), ids)


def planted(given: Rows) -> np.ndarray:
    """Nats of the size that probing finds: the more high tokens, the better."""
    return 1e-3 * (given.input_ids.astype(np.int64) > 40).mean(axis=1) - 5e-4


def fit(given: Rows, influences: np.ndarray, **options: Any) -> tuple[Fit, Any]:
    function = Fit(influences, build(MatesConfig, {"size": "xs", "epochs": 10, **options}), VOCAB, T, seed=3)
    return function, function(given)


@pytest.mark.parametrize("size", ["xs", "s"])
def test_a_planted_function_is_found(size: str) -> None:
    given = rows(400, seed=0)
    function, fitted = fit(given, planted(given), size=size)
    assert fitted["spearman"] > 0.9 and 0.7 < fitted["r2"] <= 1
    assert fitted["judged"] == 50
    unseen = rows(300, seed=1)
    found = Influence.of(fitted, function)(unseen)["score"]
    assert spearman(found, planted(unseen)) > 0.9
    assert 0.7 < found.std() < 1.3, "in standard deviations of the probes' influences"
    one = Influence.of(fitted, function)(unseen[np.array([7, 200])])["score"]
    np.testing.assert_allclose(one, found[[7, 200]], rtol=1e-5, atol=1e-6)  # a score does not depend on its company


def test_noise_is_called_noise() -> None:
    given = rows(400, seed=0)
    _, fitted = fit(given, np.random.default_rng(2).normal(size=400))
    assert abs(fitted["spearman"]) < 0.35 and fitted["r2"] < 0.1


def test_the_same_seed_gives_the_same_model() -> None:
    given = rows(64, seed=0)
    first, second = (fit(given, planted(given), epochs=2)[1] for _ in range(2))
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_probes_without_influence_are_left_out_and_outliers_do_not_rule() -> None:
    given = rows(400, seed=0)
    influences = planted(given)
    influences[::10] = np.nan
    influences[[5, 6]] = 1.0, -2.0
    _, fitted = fit(given, influences)
    assert fitted["judged"] == 360 // 8
    assert fitted["spearman"] > 0.9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, np.nan], [-1.349, -0.6745, 0, 0.6745, 1.349, np.nan]),  # quartiles 1 and 3
        ([2.0, 2.0, 2.0, 2.0, 2.0, 4.0], [0, 0, 0, 0, 0, 2 / np.std([2, 2, 2, 2, 2, 4])]),
        ([3.0, 3.0], [0, 0]),
    ],
)
def test_standardised(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(standardised(np.array(values)), expected)


@pytest.mark.parametrize("influences", [np.full(20, 0.25), np.r_[np.arange(15), np.full(5, np.nan)]])
def test_influences_that_say_nothing_are_refused(influences: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"of 20 probes have an influence on the target loss, and") as raised:
        fit(rows(20, seed=0), influences)
    assert "\n" not in str(raised.value)


def test_only_tokens_that_the_lm_sees_count() -> None:
    given = rows(64, seed=0)
    function = Fit(planted(given), build(MatesConfig, {"size": "xs", "epochs": 2}), VOCAB, 8, seed=3)
    scorer = Influence.of(function(given), function)
    changed = given.input_ids.copy()
    changed[:, 8:] = 0
    other = Rows(given.sample_ids, given.domains, changed)
    np.testing.assert_array_equal(scorer(given)["score"], scorer(other)["score"])


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 99], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 0.5),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # mean ranks 1.5 1.5 3 4 against 1 2 3 4
        ([5, 5, 5], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation(left: list[float], right: list[float], expected: float) -> None:
    assert spearman(np.array(left, dtype=float), np.array(right, dtype=float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [([1, 2, 3], 1.0), ([2, 2, 2], 0.0), ([1, 2, 1], -1.0), ([3, 2, 1], -3.0)],
)
def test_explained_variance_by_hand(found: list[float], expected: float) -> None:
    assert explained(np.array(found), np.array([1.0, 2.0, 3.0])) == pytest.approx(expected)
    assert explained(np.array(found), np.full(3, 7.0)) == 0.0
