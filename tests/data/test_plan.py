"""The read order as a pure function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_dwm.data.plan import ReadPlan, target_rows
from ray_dwm.errors import DataError


def plan(**changes: Any) -> ReadPlan:
    values: dict[str, Any] = {
        "rows_per_file": (37, 5, 64),
        "global_batch": 8,
        "seed": 3,
        "block_rows": 4,
        "window_blocks": 6,
    }
    return ReadPlan(**{**values, **changes})


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_visits_no_row_twice(epoch: int) -> None:
    p = plan()
    first = epoch * p.batches_per_epoch
    rows = np.concatenate([p.rows(first + k) for k in range(p.batches_per_epoch)])
    assert len(rows) == 106 // 8 * 8
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0 and rows.max() < 106


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [0, 7, 12, 13, 40])
def test_ranks_share_the_same_global_batch(world: int, batch: int, stored: bool) -> None:
    shares = [plan(stored=stored).rows(batch, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(shares), plan(stored=stored).rows(batch))


def test_the_order_of_plain_shards_stays_what_it_was() -> None:
    """A run that is continued after an update must go on where it was."""
    assert plan().rows(0).tolist() == [95, 96, 97, 94, 30, 28, 43, 49]
    assert plan().rows(14).tolist() == [46, 14, 48, 15, 80, 65, 78, 36]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 5])
def test_stored_order_on_any_number_of_ranks_and_after_a_restart(world: int, first: int) -> None:
    """Batches first .. of the first epoch are the rows from first * 8 on, whoever reads them and wherever he begins."""
    p = plan(stored=True)
    batches = [np.concatenate([p.rows(k, rank, world) for rank in range(world)])[:8] for k in range(first, 13)]
    assert np.concatenate(batches).tolist() == list(range(first * 8, 104))


def test_epochs_after_a_stored_one_are_shuffled_as_ever() -> None:
    for batch in range(13, 30):
        np.testing.assert_array_equal(plan(stored=True).rows(batch), plan().rows(batch))


def test_order_depends_on_seed_and_epoch_only() -> None:
    p = plan()
    np.testing.assert_array_equal(p.rows(9), plan().rows(9))
    assert not np.array_equal(p.rows(0), plan(seed=4).rows(0))
    assert not np.array_equal(p.rows(0), p.rows(p.batches_per_epoch))


def test_a_window_is_shuffled_across_its_blocks_and_touches_no_other() -> None:
    p = plan(rows_per_file=(240,), block_rows=4, window_blocks=10)
    window = np.concatenate([p.rows(k) for k in range(5)])  # 40 rows: exactly the first window
    blocks = {row // 4 for row in window.tolist()}
    assert len(blocks) == 10
    assert not np.array_equal(np.sort(window), window)
    assert len({row // 4 for row in p.rows(0).tolist()}) > 2


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than a global batch of 200"):
        plan(global_batch=200)


def test_target_batches_are_fresh_and_hold_no_row_twice() -> None:
    drawn = [target_rows(40, 16, update, seed=0) for update in range(20)]
    assert all(len(set(rows.tolist())) == 16 for rows in drawn)
    assert len({tuple(rows.tolist()) for rows in drawn}) == 20
    np.testing.assert_array_equal(drawn[3], target_rows(40, 16, 3, seed=0))
    assert set(np.concatenate(drawn).tolist()) == set(range(40))
