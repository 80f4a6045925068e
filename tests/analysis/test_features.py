"""Features of sequences by hand, and against what they are said to be."""

from __future__ import annotations

import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from local import sweep
from texts import SEA, planted, text_shards

from ray_dwm.analysis.features import (
    Count,
    Measure,
    Reading,
    bigrams,
    compression_ratio,
    cosines,
    cosines_with_others,
    distinct,
    embedded,
    measure,
    total,
)
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.shards import Rows, open_shards


@pytest.mark.parametrize(
    ("ids", "unigrams", "pairs"),
    [([1, 2, 3, 4], 1, 1), ([5, 5, 5, 5], 1 / 4, 1 / 3), ([1, 2, 1, 2], 1 / 2, 2 / 3), ([0, 1, 1, 0], 1 / 2, 1)],
)
def test_distinct_ngrams(ids: list[int], unigrams: float, pairs: float) -> None:
    rows = np.array([ids, ids], dtype=np.uint16)
    assert distinct(rows).tolist() == [unigrams] * 2
    assert distinct(bigrams(rows)).tolist() == [pairs] * 2


def test_neighbours_of_large_vocabularies_do_not_collide() -> None:
    assert len(set(bigrams(np.array([[70_000, 1, 70_000, 0, 65_536]], dtype=np.int32)).ravel().tolist())) == 4


def test_repetitive_text_compresses() -> None:
    text = b"the same words " * 20
    assert compression_ratio(text) == len(text) / len(zlib.compress(text, 9)) > 8
    assert compression_ratio(bytes(np.random.default_rng(0).integers(256, size=300, dtype=np.uint8))) < 1


def test_cosines_by_hand() -> None:
    vectors = embedded(np.array([[0, 0, 1], [2, 2, 2]]), np.array([1.0, 2.0, 0.0]))
    assert vectors.tolist() == [[2, 2, 0], [0, 0, 0]]
    assert cosines(vectors, np.array([1.0, 0, 5])).tolist() == pytest.approx([1 / math.sqrt(26) / math.sqrt(2), 0])
    three = np.array([[1.0, 0], [1, 0], [0, 1]])
    # The others of the first are (1, 1), those of the last (2, 0).
    assert cosines_with_others(three).tolist() == pytest.approx([1 / math.sqrt(2)] * 2 + [0])


def rows_of(ids: list[list[int]]) -> Rows:
    n = len(ids)
    return Rows(np.arange(n), np.zeros(n, dtype=np.int32), np.array(ids, dtype=np.uint16))


READING = Reading("nowhere", 3, 4, text=False)


def by_hand(batch: int = 2) -> Measure:
    """A pool of two rows; token 3 never occurs. The target set is the pool's first row; a 4th column is cut off."""
    pool = total([Count(READING)(rows_of([[0, 0, 1, 3]])), Count(READING)(rows_of([[0, 2, 2, 3]]))])
    assert (pool.tokens_V.tolist(), pool.rows_V.tolist(), pool.rows) == ([3, 1, 2, 0], [2, 1, 1, 0], 2)
    target = total([Count(READING)(rows_of([[0, 0, 1, 3]]))])
    return measure(READING, pool, [target], eos_token_id=2, batch=batch, reference="", size=1)


def test_measures_by_hand() -> None:
    measuring = by_hand()
    found = measuring(rows_of([[0, 0, 1, 9], [2, 2, 3, 9]]))
    # p = (count + 1) / (6 + 4)
    expected = [-(2 * math.log(0.4) + math.log(0.2)) / 3, -(2 * math.log(0.3) + math.log(0.1)) / 3]
    assert found["rarity"] == pytest.approx(expected)
    # idf: token 0 is in all rows and counts nothing, 1 and 2 in one of two, 3 in none.
    half, none = math.log(3 / 2), math.log(3)
    assert measuring.idf_V == pytest.approx([0, half, half, none])
    assert found["target_cosine"] == pytest.approx([1, 0])
    centre = np.array([0, 1, 2, 0]) / math.sqrt(5)
    second = np.array([0, 0, 2 * half, none]) / math.hypot(2 * half, none)
    assert found["corpus_distance"] == pytest.approx([1 - centre[1], 1 - centre @ second])
    assert found["batch_distance"] == pytest.approx([1, 1])  # nothing in common but token 0
    assert found["document_length"].tolist() == [3, 1]  # "0 0 1", and "2", "2", "3"
    assert found["distinct_1"].tolist() == [2 / 3, 2 / 3]
    assert found["dsir"][0] > found["dsir"][1]
    assert found.keys().isdisjoint({"compression_ratio", "bytes_per_token", "reference_perplexity"})


def test_each_batch_has_a_centroid_of_its_own() -> None:
    rows = rows_of([[1, 1, 0], [1, 0, 0], [2, 2, 0], [2, 0, 0]])
    assert by_hand(batch=2)(rows)["batch_distance"] == pytest.approx([0] * 4, abs=1e-6)
    assert (by_hand(batch=4)(rows)["batch_distance"] > 0.2).all()


def measured(pool: Manifest, target: Manifest | None) -> dict[str, np.ndarray]:
    reading = Reading(str(pool.folder), pool.seq_len, pool.vocab_size, text=True)
    count = partial(sweep, function=Count(reading))
    targets = [] if target is None else [total(count("target", str(target.folder)))]
    measuring = measure(
        reading,
        total(count("pool", str(pool.folder))),
        targets,
        eos_token_id=pool.eos_token_id,
        batch=20,
        reference="",
        size=1,
    )
    return dict(measuring(open_shards(str(pool.folder)).take(np.arange(pool.rows))))


def test_texts_that_resemble_the_target_are_found(tmp_path: Path) -> None:
    pool, target = map(load_manifest, planted(tmp_path))
    found = measured(pool, target)
    alike = np.arange(pool.rows) % 2 == 0
    alike &= np.arange(pool.rows) < 80  # every other one of a_mix
    for name in ("dsir", "target_cosine"):
        assert found[name][alike].min() > found[name][~alike].max(), name
    assert (found["bytes_per_token"] > 1).all() and (found["compression_ratio"] > 0.8).all()


def test_without_a_target_set_nothing_resembles_it(tmp_path: Path) -> None:
    found = measured(text_shards(tmp_path / "pool", {"sea": [SEA] * 40}), None)
    assert found.keys().isdisjoint({"dsir", "target_cosine"})
    assert np.ptp(found["batch_distance"]) < 1e-6  # all the same text, whose every token is in all rows
