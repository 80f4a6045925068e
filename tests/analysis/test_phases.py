"""Recorded weights as batches, phases as configured, and samples of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic_runs import BATCH, STEPS, plant_weights, write_run

from ray_dwm.analysis.phases import Batches, Span, inside, sample, spans, weighted_batches
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.data.shards import Rows
from ray_dwm.errors import UserError


def run(root: Path, *overrides: str, method: str = "dwm") -> Run:
    return open_run(write_run(root, "r", *overrides, method=method, final=2.0))


def test_recorded_weights_as_batches(tmp_path: Path) -> None:
    """What write_run says: sample i of a step has weight (2 i + 1) / BATCH, domains take turns."""
    found = weighted_batches(run(tmp_path))
    assert found.steps_S.tolist() == list(range(1, STEPS + 1)) and found.names == ("good", "noise")
    assert found.weights_SB.tolist() == [[(2 * i + 1) / BATCH for i in range(BATCH)]] * STEPS
    assert found.domains_SB.tolist() == [[0, 1] * (BATCH // 2)] * STEPS
    assert found.ids_SB[1].tolist() == [1000 + 2 * BATCH + i for i in range(BATCH)]
    assert (found.losses_SB == 2).all()


def test_steps_of_uniform_weights_are_left_out(tmp_path: Path) -> None:
    def from_step_4(step: int, rows: Rows) -> np.ndarray:
        return np.arange(len(rows)) * (step >= 4)

    found = run(tmp_path)
    plant_weights(found.config, from_step_4)
    assert weighted_batches(found).steps_S.tolist() == list(range(4, STEPS + 1))
    plant_weights(found.config, lambda step, rows: np.zeros(len(rows)))
    assert len(weighted_batches(found).steps_S) == 0 and spans(found.config, np.array([])) == []


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    found = run(tmp_path)
    (file,) = (found.folder / "weights").glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.slice(3), file)
    with pytest.raises(UserError, match="8 sequences of step 2 and 5 of step 1"):
        weighted_batches(found)
    pq.write_table(table.drop_columns(["loss"]), file)
    with pytest.raises(UserError, match=r"weights is damaged .*loss"):
        weighted_batches(found)


STAGES = ("bilevel.stages=2", "bilevel.stage_updates=2", "bilevel.warmup_steps=2")


@pytest.mark.parametrize(
    ("overrides", "method", "expected"),
    [
        ((), "dwm", [("early", 1, 3), ("middle", 4, 6), ("late", 7, 10)]),
        # Stages begin at LM steps 2 and 6 (from 0), whose weights are those of steps 3 and 7.
        (STAGES, "dwm", [("stage 1", 3, 6), ("stage 2", 7, 10)]),
        (STAGES, "loss", [("early", 1, 3), ("middle", 4, 6), ("late", 7, 10)]),
    ],
)
def test_phases(tmp_path: Path, overrides: tuple[str, ...], method: str, expected: list[tuple[str, int, int]]) -> None:
    config = run(tmp_path, *overrides, method=method).config
    assert spans(config, np.arange(1, STEPS + 1)) == [Span(*phase) for phase in expected]


def many(steps: int, size: int) -> Batches:
    """Weights are the columns' numbers."""
    shape = (steps, size)
    columns = np.tile(np.arange(size), (steps, 1))
    return Batches(
        steps_S=np.arange(1, steps + 1),
        ids_SB=np.arange(steps * size).reshape(shape),
        domains_SB=columns % 2,
        names=("a", "b"),
        losses_SB=columns.astype(float),
        weights_SB=columns.astype(float),
    )


PHASES = [Span("early", 1, 30), Span("late", 31, 60)]


@pytest.mark.parametrize(("samples", "each"), [(10**6, 30), (2 * 16 * 12, 12), (2 * 16 * 12 + 31, 12)])
def test_a_sample_is_spread_evenly(samples: int, each: int) -> None:
    taken = sample(many(60, 16), PHASES, samples, np.random.default_rng(0), "r")
    assert np.bincount(taken.phases_S).tolist() == [each, each]
    steps = taken.batches.steps_S
    assert (np.diff(steps) > 0).all() and {1, 30, 31, 60} <= set(steps.tolist()) and np.diff(steps).max() <= 3
    assert taken.batches.ids_SB.tolist() == [[16 * (step - 1) + i for i in range(16)] for step in steps]


def test_of_large_batches_a_part_is_taken() -> None:
    taken = sample(many(60, 200), PHASES, 10**6, np.random.default_rng(0), "r").batches
    assert taken.ids_SB.shape == (60, 64) and (taken.weights_SB == taken.losses_SB).all()
    assert (taken.ids_SB % 200 == taken.weights_SB).all() and (taken.domains_SB == taken.weights_SB % 2).all()
    assert len({tuple(row) for row in taken.weights_SB.tolist()}) > 50  # other ones of each batch
    assert set(taken.weights_SB.ravel().tolist()) == set(range(200))


@pytest.mark.parametrize(
    ("phases", "size", "samples", "message"),
    [
        ([Span("early", 1, 9), Span("late", 10, 60)], 16, 10**6, "r: 9 weighted steps .* phase early .steps 1 to 9."),
        (PHASES, 16, 319, r"r: --samples is 319, and 10 steps of 16 sequences from each of 2 phases are 320"),
        (PHASES, 3, 10**6, "batches of 3 sequences are too small"),
    ],
)
def test_too_few_points_are_told(phases: list[Span], size: int, samples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(many(60, size), phases, samples, np.random.default_rng(0), "r")


def test_inside_both_ends_count() -> None:
    assert inside(many(10, 4), Span("x", 3, 5)).tolist() == [2, 3, 4]
