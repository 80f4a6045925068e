"""Ray Data must deliver what reading the shards by the plan delivers, for any world and from any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic import make_shards

from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import LocalSource
from ray_dwm.errors import DataError
from ray_dwm.orchestration import ingest
from ray_dwm.orchestration.ingest import RayDataSource

pytestmark = pytest.mark.usefixtures("driver")


@pytest.mark.parametrize(
    ("world", "first", "stop", "stored"),
    [(1, 0, 20, False), (2, 0, 20, False), (2, 13, 37, True), (4, 31, 33, False)],
)
def test_streams_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, first: int, stop: int, stored: bool
) -> None:
    manifest = make_shards(tmp_path / "shards", good=60, noise=70, files=3, masked=True)
    plan = ReadPlan(
        rows_per_file=manifest.rows_per_file, global_batch=8, seed=5, block_rows=4, window_blocks=8, stored=stored
    )
    # Several blocks and read tasks, and epochs that end inside one.
    monkeypatch.setattr(ingest, "_BLOCKS_IN_MEMORY", 64 * 2**20 // 1300)
    monkeypatch.setattr(ingest, "_TASK_BLOCKS", 2)
    for rank in sorted({0, world - 1}):
        local = LocalSource(ShardReader(manifest), plan, rank, world).stream(first, stop)
        streamed = RayDataSource(str(manifest.folder), plan, rank, world, 2, 64).stream(first, stop)
        pairs = list(zip(streamed, local, strict=True))
        assert len(pairs) == stop - first
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours.sample_ids, theirs.sample_ids)
            np.testing.assert_array_equal(ours.domains, theirs.domains)
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
            np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)


def test_a_block_that_is_not_due_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_shards(tmp_path / "shards", good=60, noise=70)
    plan = ReadPlan(rows_per_file=manifest.rows_per_file, global_batch=8, seed=5)
    source = RayDataSource(str(manifest.folder), plan, 0, 1, 2, 64)
    whole = pa.concat_tables(ingest._read(str(manifest.folder), plan, 0, 1, 1, 0, 3))
    for blocks, message in (([whole[8:]], "did not deliver batch 0"), ([], "ended before batch 0 of 3")):
        monkeypatch.setattr(source, "_blocks", lambda _, blocks=blocks: iter(blocks))
        with pytest.raises(DataError, match=message):
            list(source.stream(0, 3))
