"""The classifier: its optimum by hand and by Newton's method, planted documents found, figures of the held-out part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local import task
from texts import HILL, planted, text_shards

from ray_dwm.config.selection import ClassifierConfig
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError
from ray_dwm.selection import classifier
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.classifier import Bags, Examples, auc, fit, judged
from ray_dwm.selection.methods import score
from ray_dwm.selection.ngrams import Ngrams
from ray_dwm.selection.scores import gather


def bags(*rows: list[int]) -> Bags:
    found = Ngrams(np.array([b for row in rows for b in row], dtype=np.int64), np.array([[len(row) for row in rows]]))
    return Bags.of(found, len(rows), 12)


def test_bags_by_hand() -> None:
    found = bags([3, 1, 3, 3, 3, 1, 1], [], [2])
    assert found.buckets.tolist() == [1, 3, 2]
    assert found.values == pytest.approx([3 / 5, 4 / 5, 1])
    assert found.sizes.tolist() == [2, 0, 1]
    assert found.dot(np.array([0, 10.0, 7, 20])) == pytest.approx([22, 0, 7])
    assert found.combine(np.array([2.0, 9, -1]), 5) == pytest.approx([0, 1.2, -1, 1.6, 0])


def test_the_optimum_by_hand() -> None:
    """Rows of bucket 0 against rows of bucket 1: weights a and -a with 1 / (1 + e^a) = 2 a / n, and no bias."""
    found = fit(bags([0], [0], [1], [1]), np.array([1.0, 1, 0, 0]), np.full(4, 0.25), 3)
    low, high = 0.0, 10.0
    for _ in range(60):
        a = (low + high) / 2
        low, high = (a, high) if 1 / (1 + np.exp(a)) > 2 * a / 4 else (low, a)
    assert found.weights == pytest.approx([low, -low, 0], abs=1e-7)
    assert found.bias == pytest.approx(0, abs=1e-7)


def test_the_optimum_by_newtons_method() -> None:
    rng = np.random.default_rng(0)
    rows, weights = bags(*rng.integers(0, 12, size=(40, 9)).tolist()), rng.dirichlet(np.ones(40))
    labels = rng.integers(0, 2, size=40).astype(float)
    weights[::7] = 0  # held out
    x = np.stack([*(rows.dot(row) for row in np.eye(12)), np.ones(40)], axis=1)
    penalty = np.diag([1 / (weights > 0).sum()] * 12 + [0])
    theta = np.zeros(13)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (weights * (p - labels)) + penalty @ theta
        theta -= np.linalg.solve(x.T @ (x * (weights * p * (1 - p))[:, None]) + penalty, gradient)
    found = fit(rows, labels, weights, 12)
    assert [*found.weights, found.bias] == pytest.approx(theta, abs=1e-6)
    assert np.abs(theta).max() > 0.5


def test_auc_by_hand() -> None:
    assert auc(np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx((3 + 1.5) / 6)
    found = judged(np.array([2.0, -1, 1, -3]), np.array([True, True, False, False]))
    assert found == {"target": 2, "pool": 2, "auc": 0.75, "accuracy": 0.5}
    assert judged(np.array([2.0]), np.array([True]))["auc"] is None


@pytest.mark.parametrize("features", ["text", "tokens"])
def test_planted_documents_are_found(tmp_path: Path, features: str) -> None:
    pool, target = planted(tmp_path)
    job = task(pool, {"target": target}, classifier={"features": features})
    scored = gather(score("classifier", job), job.pool)
    assert highest(job, scored, 40).tolist() == list(range(0, 80, 2))
    assert job.notes["examples"] == {"target": 30, "pool": 120}
    held_out = job.notes["held_out"]
    assert 0 < held_out["target"] < 12 and 0 < held_out["pool"] < 40
    # A third of the pool is as the target is, and cannot be told from it.
    assert held_out["auc"] >= 0.6


def test_sets_weigh_the_same_and_what_is_held_out_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pool 1/2, two target sets of different sizes 1/4 each, dealt out among the rows that are learnt from."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(classifier, "fit", lambda *args: given.update(labels=args[1], weights=args[2]) or fit(*args))
    pool, sea = planted(tmp_path)
    text_shards(tmp_path / "hill", {"t": [HILL] * 90})
    job = task(pool, {"a": sea, "b": tmp_path / "hill"})
    classifier.prepare(job)
    parts = np.split(given["weights"], [120, 150])  # of the pool, of 30 rows and of 90
    assert [part.sum() for part in parts] == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert all(len(np.unique(part)) == 2 for part in parts)
    assert given["labels"].tolist() == [0.0] * 120 + [1.0] * 120
    held_out = job.notes["held_out"]
    assert [held_out["pool"], held_out["target"]] == [(p == 0).sum() for p in np.split(given["weights"], 2)]
    assert held_out["pool"] > 0 < held_out["target"]
    by_set = job.notes["held_out_by_set"]
    assert {found["pool"] for found in by_set.values()} == {held_out["pool"]}
    assert sum(found["target"] for found in by_set.values()) == held_out["target"]
    assert by_set["b"]["auc"] == 1 > by_set["a"]["auc"], "nothing in the pool is of b, and a third is as a"


def test_other_blocks_give_the_same_classifier(tmp_path: Path) -> None:
    pool, target = planted(tmp_path)
    scores = []
    for size in (50, 17):
        job = task(pool, {"target": target}, classifier={"samples": 100}, block=size)
        scores.append(gather(score("classifier", job), job.pool).scores)
    assert np.array_equal(*scores)
    assert 80 <= job.notes["examples"]["pool"] < 120


@pytest.mark.parametrize("features", ["text", "tokens"])
def test_a_block_of_which_nothing_is_sampled(tmp_path: Path, features: Any) -> None:
    pool, _ = planted(tmp_path)
    examples = Examples(str(pool), ClassifierConfig(features=features), rate=0.0, seed=1)
    found = examples(open_shards(str(pool)).take(np.arange(5)))
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 0)


def test_every_target_draws_its_own_kind_of_documents(tmp_path: Path) -> None:
    pool, sea = planted(tmp_path / "sea")
    _, hill = planted(tmp_path / "hill", target=HILL)
    scores = {
        name: gather(score("classifier", job), job.pool).scores
        for name, job in {"one": task(pool, {"a": sea}), "both": task(pool, {"a": sea, "b": hill})}.items()
    }
    assert scores["one"][80:].mean() < 0 < scores["both"][80:].mean()
    assert scores["both"][1:80:2].max() < scores["both"][0:80:2].min()  # code after sea


def test_choice(tmp_path: Path) -> None:
    pool, target = planted(tmp_path)
    for choice, expected in (("highest", highest), ("drawn", drawn)):
        job = task(pool, {"target": target}, classifier={"choice": choice})
        scored = gather(score("classifier", job), job.pool)
        assert np.array_equal(classifier.choose(job, scored, 30), expected(job, scored, 30))
    assert not np.array_equal(highest(job, scored, 30), drawn(job, scored, 30))


def test_texts_without_words_are_refused(tmp_path: Path) -> None:
    text_shards(tmp_path / "empty", {"a": ["\n"] * 10})
    pool, _ = planted(tmp_path)
    with pytest.raises(DataError, match="has no words to learn from"):
        classifier.prepare(task(pool, {"target": tmp_path / "empty"}))
