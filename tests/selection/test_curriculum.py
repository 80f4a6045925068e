"""Curricula: pacing and order by hand, the same sequences in every order, and training that keeps the order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local import task
from synthetic import make_shards, tiny_config
from texts import planted

from ray_dwm.config import build
from ray_dwm.config.selection import CurriculumConfig, SelectionConfig
from ray_dwm.data.manifest import Manifest, ShardFile, load_manifest
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.engine.batch import LocalSource
from ray_dwm.engine.checks import read_plan
from ray_dwm.errors import ConfigError
from ray_dwm.selection import curriculum
from ray_dwm.selection.curriculum import Brevity, arranged, available, paced, pacing
from ray_dwm.selection.method import Scored, applies
from ray_dwm.selection.methods import METHODS, score
from ray_dwm.selection.scores import gather
from ray_dwm.selection.write import write_part


@pytest.mark.parametrize(
    ("kind", "start", "full", "expected"),  # at t = 0, 1/4, 1/2, 3/4
    [
        ("linear", 0.2, 0.5, [0.2, 0.6, 1, 1]),
        ("linear", 0.0, 1.0, [0, 0.25, 0.5, 0.75]),
        ("root", 0.6, 0.5, [0.6, 0.68**0.5, 1, 1]),  # 0.36 + 0.64 / 2
        ("root", 0.0, 1.0, [0, 0.5, 0.5**0.5, 0.75**0.5]),
        ("geometric", 0.01, 0.5, [0.01, 0.1, 1, 1]),
        ("stepwise", 0.3, 0.5, [0.3, 0.3, 1, 1]),
    ],
)
def test_pacing_functions_by_hand(kind: Any, start: float, full: float, expected: list[float]) -> None:
    options = CurriculumConfig(pacing=kind, start=start, full=full)
    assert pacing(options, np.array([0, 0.25, 0.5, 0.75])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], [1, 2, 3, 4]),  # each has one place: the ranking itself
        ([0.5, 0.5, 0.5, 1.0], [2, 2, 3, 4]),
        ([0.3, 0.6, 0.6, 0.8], [2, 3, 3, 4]),
        ([1.0, 1.0, 1.0, 1.0], [4, 4, 4, 4]),
    ],
)
def test_what_is_available_by_hand(fractions: list[float], expected: list[int]) -> None:
    assert available(np.array(fractions)).tolist() == expected


def test_whole_numbers_are_not_rounded_up() -> None:
    assert available(np.full(10, 0.1 + 0.2))[0] == 3


@pytest.mark.parametrize(
    ("limits", "numbers", "expected"),
    [
        ([1, 2, 3, 4], [0.9, 0.9, 0.9, 0.9], [0, 1, 2, 3]),
        ([2, 2, 3, 4], [0.5, 0.9, 0.9, 0.9], [1, 0, 2, 3]),
        # of 0 1 2 the middle; of 0 2 the last; of 0 3 the last; what is left
        ([3, 3, 4, 4], [0.5, 0.99, 0.6, 0.0], [1, 2, 3, 0]),
        ([4, 4, 4, 4], [0.0, 0.0, 0.0, 0.0], [0, 3, 2, 1]),  # the last takes the place of what is drawn
    ],
)
def test_drawing_by_hand(limits: list[int], numbers: list[float], expected: list[int]) -> None:
    assert paced(np.array(limits), np.array(numbers)).tolist() == expected


def test_what_is_available_is_drawn_uniformly() -> None:
    rng = np.random.default_rng(0)
    free = Counter(tuple(paced(np.array([3, 3, 3]), rng.random(3)).tolist()) for _ in range(6000))
    assert free.keys() == set(permutations(range(3)))
    assert sum((count - 1000) ** 2 / 1000 for count in free.values()) < 20.5  # 99.9 % of chi^2, 5 degrees of freedom
    late = Counter(tuple(paced(np.array([2, 3, 3]), rng.random(3)).tolist()) for _ in range(4000))
    # 0 or 1 first; then one of the two that are left, 2 among them.
    assert late.keys() == {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0)}
    assert sum((count - 1000) ** 2 / 1000 for count in late.values()) < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize("kind", ["linear", "root", "geometric", "stepwise"])
def test_nothing_comes_before_it_is_available(kind: Any) -> None:
    options = CurriculumConfig(pacing=kind, start=0.2, full=0.6)
    ease = np.random.default_rng(1).random(500)
    order = arranged(ease, options, seed=3)
    assert sorted(order.tolist()) == list(range(500))
    rank = np.empty(500, dtype=int)
    rank[np.argsort(-ease)] = np.arange(500)
    limits = available(pacing(options, np.arange(500) / 500))
    assert (rank[order] < limits).all()
    assert not np.array_equal(rank[order], np.arange(500))


def test_the_plain_ranking_and_its_reverse() -> None:
    options = CurriculumConfig(pacing="linear", start=0.0, full=1.0)
    ease = np.array([0.3, 0.9, 0.1, 0.5])
    assert arranged(ease, options, 0).tolist() == [1, 3, 0, 2]
    assert arranged(ease, replace(options, order="hard_first"), 0).tolist() == [2, 0, 3, 1]


def test_ties_come_in_any_order() -> None:
    options = CurriculumConfig(pacing="linear", start=0.0, full=1.0)
    ease = np.repeat([1.0, 0.0], 100)
    order = arranged(ease, options, 0)
    assert sorted(order[:100].tolist()) == list(range(100)) != order[:100].tolist()


def test_all_orders_are_of_the_same_sequences(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=90, noise=30)
    pool = Scored(np.arange(120.0), np.repeat(np.array([0, 1], dtype=np.int32), [90, 30]))
    found = {
        order: curriculum.choose(task(tmp_path / "pool", {}, curriculum={"order": order}), pool, 40)
        for order in ("easy_first", "hard_first", "shuffled")
    }
    assert len({tuple(sorted(rows.tolist())) for rows in found.values()}) == 1
    mean = {order: pool.scores[rows[:10]].mean() - pool.scores[rows].mean() for order, rows in found.items()}
    assert mean["easy_first"] > 20 > abs(mean["shuffled"]) and mean["hard_first"] < -20
    stratified = task(tmp_path / "pool", {}, stratified="true")
    assert np.bincount(pool.domains[curriculum.choose(stratified, pool, 40)]).tolist() == [30, 10]


def test_mean_lengths_of_documents_by_hand() -> None:
    rows = [[5, 5, 5, 5], [5, 0, 5, 5], [5, 5, 5, 0], [0, 0, 5, 0], [0, 5, 5, 5]]
    found = Brevity(eos_token_id=0)(Rows(np.arange(5), np.zeros(5, dtype=np.int32), np.array(rows, dtype=np.uint16)))
    assert found["documents"].tolist() == [1, 2, 1, 3, 2]
    assert found["score"] == pytest.approx([-4, -2, -4, -4 / 3, -2])


def test_similarity_is_dsirs_ratio_and_asks_for_a_target(tmp_path: Path) -> None:
    pool, target = planted(tmp_path)
    job = task(pool, {"target": target}, curriculum={"criterion": "similarity"})
    found = gather(score("curriculum", job), job.pool).scores
    assert np.array_equal(found, gather(score("dsir", job), job.pool).scores)
    asks = {
        criterion: [applies(when, build(SelectionConfig, {"curriculum": {"criterion": criterion}})) for when in hooks]
        for criterion in ("length", "perplexity", "similarity", "dwm")
        for hooks in [(METHODS["curriculum"].targeted, METHODS["curriculum"].proxies)]
    }
    assert asks == {
        "length": [False, False],
        "perplexity": [False, True],
        "similarity": [True, False],
        "dwm": [False, False],
    }


def test_scores_serve_every_order_and_pacing() -> None:
    def depends(**options: str) -> dict[str, Any]:
        return curriculum.depends(build(SelectionConfig, {"curriculum": options}))

    assert depends() == depends(order="hard_first", pacing="linear", start="0.3") == {"criterion": "length"}
    similar = build(SelectionConfig, {"curriculum": {"criterion": "similarity"}, "dsir": {"bigrams": "false"}})
    assert curriculum.depends(similar)["bigrams"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pacing": "geometric", "start": "0"}, "nothing grows geometrically"),
        ({"start": "1.5"}, "start is 1.5"),
        ({"full": "0"}, "full is 0"),
    ],
)
def test_pacing_that_is_none_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SelectionConfig, {"curriculum": options})


def written(rows: np.ndarray, pool: Path, folder: Path) -> Manifest:
    """Ordered shards of some rows of a pool."""
    folder.mkdir()
    np.save(folder / "rows.npy", rows)
    part = write_part(0, pool=str(pool), rows_file=str(folder / "rows.npy"), output=folder)
    manifest = replace(
        load_manifest(pool), folder=folder, files=(ShardFile(**part["shard"]),), made_by={"ordered": True}
    )
    manifest.write()
    return load_manifest(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_reads_the_order_that_is_written(shards: dict[str, Path], tmp_path: Path, world: int) -> None:
    """In its first epoch, by any number of workers, and by a run that is resumed after three batches."""
    job = task(shards["train"], {}, curriculum={"order": "hard_first"})
    scored = Scored(np.random.default_rng(0).random(job.pool.rows), np.zeros(job.pool.rows, dtype=np.int32))
    rows = curriculum.choose(job, scored, 100)
    manifest = written(rows, shards["train"], tmp_path / "ordered")
    config = tiny_config(shards, tmp_path, f"data.train={manifest.folder}")
    expected = open_shards(str(shards["train"])).take(rows).sample_ids[:96].tolist()  # 12 batches of 8
    for first in (0, 3):
        reader, plan = open_shards(str(manifest.folder)), read_plan(config, manifest)
        streams = [LocalSource(reader, plan, rank, world).stream(first, 12) for rank in range(world)]
        batches = [np.concatenate([part.sample_ids for part in parts])[:8] for parts in zip(*streams, strict=True)]
        assert np.concatenate(batches).tolist() == expected[first * 8 :]


@pytest.mark.parametrize(
    ("order", "ordered", "stored"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("auto", None, False),
        ("auto", "yes", False),  # manifests are not trusted to be of the right type
        ("shuffled", True, False),
        ("stored", None, True),
    ],
)
def test_which_order_is_read(
    shards: dict[str, Path], tmp_path: Path, order: str, ordered: object, stored: bool
) -> None:
    config = tiny_config(shards, tmp_path, f"data.order={order}")
    manifest = load_manifest(shards["train"])
    made_by = {} if ordered is None else {"ordered": ordered}
    assert read_plan(config, replace(manifest, made_by=made_by)).stored is stored
