"""DSIR: log ratios by hand and by the published package, and planted documents found."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from local import sweep, task
from texts import planted

from ray_dwm.data.records import read_arrays
from ray_dwm.data.shards import open_shards
from ray_dwm.data.tokenization import FOLDER, Tokenizer
from ray_dwm.selection import dsir
from ray_dwm.selection.choose import highest
from ray_dwm.selection.ngrams import WordHashes, token_ngrams
from ray_dwm.selection.scores import Keyed, gather


def bucket(ngram: str, buckets: int) -> int:
    return int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % buckets


TEXTS = ["Sea, sea!", "", "x_1 ... été", "one", "sea sea"]


@pytest.mark.parametrize(
    ("bigrams", "expected"),
    [
        (False, [["sea", ",", "sea", "!"], [], ["x_1", "...", "été"], ["one"], ["sea", "sea"]]),
        (
            True,
            [
                ["sea", ",", "sea", "!", "sea ,", ", sea", "sea !"],
                [],
                ["x_1", "...", "été", "x_1 ...", "... été"],
                ["one"],
                ["sea", "sea", "sea sea"],
            ],
        ),
    ],
)
def test_words_and_neighbours(bigrams: bool, expected: list[list[str]]) -> None:
    hashes = WordHashes(1000)
    for _ in range(2):  # hashed, then known
        found = hashes(TEXTS, bigrams)
        for row, words in enumerate(expected):
            assert sorted(found.buckets_k[found.rows_k == row]) == sorted(bucket(word, 1000) for word in words)


def test_token_ngrams() -> None:
    ids = np.array([[1, 2, 1, 2], [1, 2, 3, 1]])
    found = token_ngrams(ids, True, 10**9)
    first, second = (found.buckets_k[found.rows_k == row] for row in (0, 1))
    assert len(first) == len(second) == 7
    assert first[0] == first[2] == second[0] and first[1] != first[0]
    assert first[4] == first[6] == second[4] and len({*first[4:6], *second[5:]}) == 4
    assert np.array_equal(token_ngrams(ids.astype(np.uint16), True, 10**9).buckets_k, found.buckets_k)
    assert np.array_equal(token_ngrams(ids, False, 10**9).buckets_k, found.buckets_k[:8])
    assert len(set(token_ngrams(np.array([[0, 5, 6]]), True, 10**9).buckets_k)) == 5, "(0, 5) is not 6"


def test_log_ratios_by_hand() -> None:
    found = dsir.log_ratios(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25]))
    assert found[:2] == pytest.approx([np.log(2), 0.0], abs=1e-7)
    assert found[2] == pytest.approx(np.log(1e-8) - np.log(0.25), abs=1e-6)


@pytest.mark.parametrize("features", ["text", "tokens"])
def test_planted_documents_are_found(tmp_path: Path, features: str) -> None:
    pool, target = planted(tmp_path)
    job = task(pool, {"target": target}, dsir={"features": features})
    scored = gather(sweep("", str(pool), Keyed(dsir.prepare(job))), job.pool)
    assert highest(job, scored, 40).tolist() == list(range(0, 80, 2))
    assert np.bincount(scored.domains).tolist() == [80, 40]


def test_the_second_pass_takes_the_n_grams_of_the_first(tmp_path: Path) -> None:
    pool, target = planted(tmp_path)
    anew = dsir.prepare(task(pool, {"target": target}))
    kept = dsir.prepare(task(pool, {"target": target}, scratch=str(tmp_path), dsir={"buckets": 10_000}))
    assert len(files := list(tmp_path.glob("ngrams-*.npz"))) == 3  # of 120 rows, 50 at a time
    assert read_arrays(files[0])["buckets"].dtype == np.uint16
    rows = open_shards(str(pool)).take(np.arange(50))
    assert np.array_equal(replace(kept, folder="of no tokenizer")(rows)["score"], anew(rows)["score"])


def test_several_targets_count_the_same(tmp_path: Path) -> None:
    """Two copies of a target change nothing; a second target draws its own kind of documents."""
    pool, sea = planted(tmp_path / "sea")
    _, hill = planted(tmp_path / "hill", target="Shepherds led sheep over hills, bells rang in the valley.")
    scores = {
        name: gather(sweep("", str(pool), Keyed(dsir.prepare(task(pool, targets)))), task(pool, {}).pool).scores
        for name, targets in {"one": {"a": sea}, "twice": {"a": sea, "b": sea}, "both": {"a": sea, "b": hill}}.items()
    }
    assert scores["twice"] == pytest.approx(scores["one"])
    assert scores["both"][80:].mean() > scores["one"][80:].mean()


def test_log_ratios_equal_the_published_package(tmp_path: Path) -> None:
    package = pytest.importorskip("data_selection", reason="data-selection (extra `oracle`) is not installed")
    pool, target = planted(tmp_path)
    tokenizer = Tokenizer(pool / FOLDER)
    texts = {
        name: tokenizer.decode_all(open_shards(str(folder)).take(np.arange(rows)).input_ids)
        for name, folder, rows in (("pool", pool, 120), ("target", target, 30))
    }
    for name, items in texts.items():
        (tmp_path / name / "texts.txt").write_text("\0".join(items))

    def load(path: str) -> list[str]:
        return Path(path).read_text().split("\0")

    theirs = package.HashedNgramDSIR(
        [str(pool / "texts.txt")],
        [str(target / "texts.txt")],
        cache_dir=str(tmp_path / "cache"),
        raw_load_dataset_fn=load,
        raw_parse_example_fn=str,
        target_load_dataset_fn=load,
        target_parse_example_fn=str,
        num_proc=1,
    )
    theirs.fit_importance_estimator()
    expected = [theirs.importance_estimator(theirs.featurizer(text)) for text in texts["pool"]]
    job = task(pool, {"target": target})
    ours = gather(sweep("", str(pool), Keyed(dsir.prepare(job))), job.pool).scores
    assert ours == pytest.approx(expected, abs=1e-9, rel=0)
    assert np.ptp(ours) > 100
