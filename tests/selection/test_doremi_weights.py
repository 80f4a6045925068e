"""DoReMi's resampling: rows by domain weights, and weights that are given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from local import sweep, task
from synthetic import make_shards

from ray_dwm.data.manifest import load_manifest
from ray_dwm.errors import DataError
from ray_dwm.selection import doremi, random
from ray_dwm.selection.method import Scored
from ray_dwm.selection.scores import Keyed, gather


def drawn(pool: Path, weights: dict[str, float], count: int, seed: int = 0) -> tuple[np.ndarray, Scored]:
    job = dataclasses.replace(task(pool, {}, seed=seed), domain_weights=weights)
    scored = gather(sweep("", str(pool), Keyed(random.prepare(job))), job.pool)
    return doremi.choose(job, scored, count), scored


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ({"good": 0.25, "noise": 0.75}, 40, [10, 30]),
        ({"good": 1.0, "noise": 0.0}, 40, [40, 0]),
        ({"good": 0.9, "noise": 0.1}, 100, [60, 40]),  # there are 60: the rest is noise
    ],
)
def test_rows_follow_the_weights(tmp_path: Path, weights: dict[str, float], count: int, expected: list[int]) -> None:
    make_shards(tmp_path / "pool", good=60, noise=140)
    rows, scored = drawn(tmp_path / "pool", weights, count)
    assert np.bincount(scored.domains[rows], minlength=2).tolist() == expected
    assert (np.diff(rows) > 0).all()
    wanted = {name: round(weight * count) for name, weight in weights.items()}
    assert bool(doremi.short(weights, count, load_manifest(tmp_path / "pool"))) == (wanted["good"] > 60)


def test_rows_of_a_domain_are_random(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=60, noise=140)
    draws = [drawn(tmp_path / "pool", {"good": 0.5, "noise": 0.5}, 60, seed)[0] for seed in range(200)]
    counts = np.bincount(np.concatenate(draws), minlength=200)
    codes = drawn(tmp_path / "pool", {"good": 0.5, "noise": 0.5}, 60)[1].domains
    for code, size in ((0, 60), (1, 140)):
        found, p = counts[codes == code], 30 / size
        assert np.abs(found - 200 * p).max() < 5 * np.sqrt(200 * p * (1 - p))
    assert np.array_equal(draws[3], drawn(tmp_path / "pool", {"good": 0.5, "noise": 0.5}, 60, 3)[0])


@pytest.mark.parametrize("content", [{"good": 1, "noise": 3}, {"weights": {"noise": 0.75, "good": 0.25}, "seed": 0}])
def test_given_weights_are_normalised(tmp_path: Path, content: dict[str, object]) -> None:
    pool = make_shards(tmp_path / "pool", good=6, noise=6)
    (tmp_path / "w.json").write_text(json.dumps(content))
    assert doremi.read_weights(tmp_path / "w.json", pool) == {"good": 0.25, "noise": 0.75}


def test_a_domain_may_be_called_weights(tmp_path: Path) -> None:
    pool = make_shards(tmp_path / "pool", good=6, noise=6)
    pool = dataclasses.replace(pool, domains={"good": pool.domains["good"], "weights": pool.domains["noise"]})
    (tmp_path / "w.json").write_text('{"weights": 0.75, "good": 0.25}')
    assert doremi.read_weights(tmp_path / "w.json", pool) == {"good": 0.25, "weights": 0.75}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read .*No such file"),
        ("{", "cannot be read"),
        ("[1, 2]", "cannot be read .* it must be a JSON object"),
        ('{"good": 1}', "has no weight for noise, a domain of"),
        ('{"good": 1, "noise": 1, "web": 1}', r"has a weight for web, which is no domain of .* \(good, noise\)"),
        ('{"good": 1, "noise": -1}', "-1 is no weight"),
        ('{"good": 1, "noise": NaN}', "nan is no weight"),
        ('{"good": 1, "noise": "many"}', "'many' is no weight"),
        ('{"good": 0, "noise": 0}', "all weights in .* are 0"),
    ],
)
def test_given_weights_that_do_not_fit(tmp_path: Path, text: str | None, message: str) -> None:
    pool = make_shards(tmp_path / "pool", good=6, noise=6)
    if text is not None:
        (tmp_path / "w.json").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        doremi.read_weights(tmp_path / "w.json", pool)
    assert "\n" not in str(raised.value) and str(tmp_path / "w.json") in str(raised.value)
