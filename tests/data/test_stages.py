"""The read order of a run in stages."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ray_dwm.data.stages import ROWS, StagedPlan, cut, stage_folder
from ray_dwm.errors import DataError


@pytest.mark.parametrize(
    ("steps", "stages", "bounds"), [(10, 2, [0, 5, 10]), (11, 3, [0, 4, 8, 11]), (5, 5, [0, 1, 2, 3, 4, 5])]
)
def test_stages_cover_all_steps(steps: int, stages: int, bounds: list[int]) -> None:
    found = cut(steps, stages)
    assert [stage.first for stage in found] == bounds[:-1]
    assert [stage.stop for stage in found] == bounds[1:]
    assert [stage.number for stage in found] == list(range(stages))


def write(run_dir: Path, number: int, rows: np.ndarray) -> None:
    stage_folder(run_dir, number).mkdir(parents=True, exist_ok=True)
    np.save(stage_folder(run_dir, number) / ROWS, rows)


def plan(run_dir: Path) -> StagedPlan:
    return StagedPlan(run_dir=str(run_dir), steps=7, stages=2, global_batch=4, seed=3, block_rows=4, window_blocks=2)


def test_every_stage_reads_the_rows_that_were_chosen_for_it(tmp_path: Path) -> None:
    first, second = np.arange(100, 116), np.arange(1000, 1006)  # 4 batches of 4; 3 batches from one and a half
    write(tmp_path, 0, first)
    write(tmp_path, 1, second)
    p = plan(tmp_path)
    seen = np.concatenate([p.rows(batch) for batch in range(4)])
    assert sorted(seen.tolist()) == first.tolist()
    for batch in range(4, 7):
        rows = p.rows(batch).tolist()
        assert len(set(rows)) == 4 and set(rows) <= set(second.tolist())
    for batch in range(7):
        shares = [p.rows(batch, rank, 2) for rank in range(2)]
        np.testing.assert_array_equal(np.concatenate(shares), p.rows(batch))


def test_a_plan_travels_without_its_rows(tmp_path: Path) -> None:
    write(tmp_path, 0, np.arange(100_000))
    p = plan(tmp_path)
    before = p.rows(0)
    copied = pickle.dumps(p)
    assert len(copied) < 1000
    np.testing.assert_array_equal(pickle.loads(copied).rows(0), before)


def test_rows_that_were_chosen_anew_are_read_anew(tmp_path: Path) -> None:
    p = plan(tmp_path)
    write(tmp_path, 0, np.arange(16))
    assert p.rows(0).max() < 16
    write(tmp_path, 0, np.arange(100, 116))
    assert p.rows(0).min() >= 100


@pytest.mark.parametrize("spoil", ["missing", "garbled", "pickled"])
def test_rows_that_cannot_be_read_are_one_line(tmp_path: Path, spoil: str) -> None:
    if spoil != "missing":
        write(tmp_path, 0, np.array([object()] if spoil == "pickled" else [1]))
    if spoil == "garbled":
        (stage_folder(tmp_path, 0) / ROWS).write_bytes(b"no array")
    with pytest.raises(DataError, match=r"rows.npy, the rows that stage 0 trains on, cannot be read") as raised:
        plan(tmp_path).rows(0)
    assert "\n" not in str(raised.value)
