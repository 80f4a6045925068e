"""Scores of a pool as a file: what comes back is what was kept, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import make_shards

from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError
from ray_dwm.selection.record import describe
from ray_dwm.selection.scores import FILE, gather, kept, read


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of 12 rows, whose scores in two blocks are their numbers."""
    folder = tmp_path_factory.mktemp("scored") / "pool"
    make_shards(folder, good=5, noise=7, seed=3)
    rows = open_shards(str(folder)).take(np.arange(12))
    blocks = [
        {
            "sample_id": rows.sample_ids[s],
            "domain": rows.domains[s],
            "score": np.arange(12.0)[s],
            "more": np.ones(12)[s],
        }
        for s in (slice(0, 7), slice(7, 12))
    ]
    gather(kept(folder.parent / FILE, blocks, load_manifest(folder), "of these"), load_manifest(folder))
    return folder


def test_what_was_kept_is_read_back(scored: Path) -> None:
    found = read(scored.parent / FILE, load_manifest(scored), "of these")
    assert found.scores.tolist() == list(range(12))
    assert found.domains.tolist() == open_shards(str(scored)).take(np.arange(12)).domains.tolist()
    table = pq.read_table(scored.parent / FILE)
    assert table.column_names == ["sample_id", "domain", "score", "more"]
    assert sorted(table["domain"].to_pylist()) == ["good"] * 5 + ["noise"] * 7


def foreign_domain(table: pa.Table) -> pa.Table:
    names = pa.array(["web"] * len(table)).dictionary_encode()
    return table.set_column(1, "domain", names)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.sort_by([("score", "descending")]), "are not in the order of the pool"),
        (lambda t: pa.concat_tables([t[:11], t[:1]]), "are not in the order of the pool"),
        (lambda t: t[:11], "are of another pool, target set, seed or method"),
        (lambda t: t.replace_schema_metadata({}), "are of another pool, target set, seed or method"),
        (lambda t: t.drop_columns(["sample_id"]), "cannot be read"),
        (lambda t: t.set_column(2, "score", pa.array(["high"] * len(t))), "cannot be read"),
        (foreign_domain, "are not in the order of the pool"),
    ],
)
def test_other_files_are_refused(
    scored: Path, tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(spoil(pq.read_table(scored.parent / FILE)), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path / "s.parquet", load_manifest(scored), "of these")
    assert "\n" not in str(raised.value)


def test_a_domain_without_candidates_has_no_mean(scored: Path) -> None:
    found = read(scored.parent / FILE, load_manifest(scored), "of these")
    noise = np.flatnonzero(found.domains == 1)
    part = type(found)(found.scores[noise], found.domains[noise])
    domains = describe(load_manifest(scored), part, np.array([0, 2]))["domains"]
    assert domains["good"] == {
        "tokens_pool": 0, "tokens_selected": 0, "share_pool": 0.0, "share_selected": 0.0, "mean_score": None
    }  # fmt: skip
    assert domains["noise"]["mean_score"] == pytest.approx(noise.mean()) and domains["noise"]["tokens_selected"] == 32
