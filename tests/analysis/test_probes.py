"""How much a weight depends on its company, where that is known; and which DWM stands for a phase."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import STEPS, write_run
from test_dwm_scores import FirstColumn, saved

from ray_dwm.analysis.phases import Span
from ray_dwm.analysis.probe import draws, joint, log_weights, probe_rows, stability, versions
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.config import DwmConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.errors import DataError

N, B, R = 96, 8, 16


def drawn(seed: int = 0) -> np.ndarray:
    return draws(N, B, R, np.random.default_rng(seed))


def normal(rng: np.random.Generator) -> np.ndarray:
    """Of mean 0 and deviation 1, exactly."""
    values = rng.standard_normal(N)
    return (values - values.mean()) / values.std(ddof=1)


def test_every_draw_is_a_partition() -> None:
    found = drawn()
    assert found.shape == (R, N // B, B)
    assert all(sorted(part.ravel().tolist()) == list(range(N)) for part in found)
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize(("temperature", "floor"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3)])
def test_log_weights_are_those_of_training(temperature: float, floor: float) -> None:
    encoded = np.random.default_rng(1).standard_normal((N, 2)).astype(np.float32)
    found = log_weights(FirstColumn(), encoded, drawn(), DwmConfig(temperature=temperature, floor=floor))
    batch = drawn()[3, 5]
    p = np.exp(encoded[batch, 0] / temperature)
    weights = (1 - floor) * p / p.sum() + floor / B
    assert found[batch, 3] == pytest.approx(np.log(B * weights), abs=1e-5)


def test_scores_of_single_sequences_have_no_joint_effect() -> None:
    """A softmax makes weights relative all the same: that is the batches' part."""
    encoded = np.stack([normal(np.random.default_rng(2)), np.zeros(N)], axis=1).astype(np.float32)
    found = joint(log_weights(FirstColumn(), encoded, drawn(), DwmConfig()), drawn())
    assert found.company == pytest.approx(0, abs=1e-9)
    assert found.sequence == pytest.approx(1, abs=1e-4)
    assert 0 < found.batch < 0.5


def test_planted_parts_are_found() -> None:
    rng, found, places = np.random.default_rng(3), [], drawn()
    own = normal(rng)
    for _ in range(20):
        levels, noise = 0.5 * rng.standard_normal((R, N // B)), 0.3 * rng.standard_normal((N, R))
        values = own[:, None] + noise
        for column in range(R):
            for batch, rows in enumerate(places[column]):
                values[rows, column] += levels[column, batch]
        found.append(joint(values, places))
    assert np.mean([f.sequence for f in found]) == pytest.approx(1, rel=0.05)
    assert np.mean([f.batch for f in found]) == pytest.approx(0.25, rel=0.05)
    assert np.mean([f.company for f in found]) == pytest.approx(0.09, rel=0.05)
    assert found[0].total == found[0].sequence + found[0].batch + found[0].company


def test_company_alone() -> None:
    """What a sequence gets has nothing to do with it."""
    found = joint(np.random.default_rng(4).standard_normal((N, R)), drawn())
    assert found.company == pytest.approx(1, rel=0.1) and max(found.sequence, found.batch) < 0.05


def test_rank_stability() -> None:
    rng = np.random.default_rng(5)
    own, other = normal(rng)[:, None], normal(rng)[:, None]
    noise = 0.01 * rng.standard_normal((4, N, R))
    found = stability(np.stack([own, np.exp(own), -own, other]) + noise, 200, rng)
    value, low, high = found.value_PP, found.low_PP, found.high_PP
    assert (np.diag(value) > 0.99).all()  # the halves agree
    assert value[0, 1] > 0.99 and value[0, 2] < -0.99 and abs(value[0, 3]) < 0.3
    assert np.array_equal(value, value.T) and low[0, 3] < value[0, 3] < high[0, 3] and low[0, 3] < 0 < high[0, 3]


def test_company_in_common_is_no_agreement() -> None:
    """Two DWMs that agree on company alone, whose draws are the same in both."""
    rng = np.random.default_rng(6)
    company = 3 * rng.standard_normal((N, R))
    found = stability(np.stack([normal(rng)[:, None] + company, normal(rng)[:, None] + company]), 50, rng)
    assert abs(found.value_PP[0, 1]) < 0.2 < found.value_PP[0, 0]


def test_a_dwm_that_weighs_all_alike_has_no_ranks() -> None:
    found = stability(np.zeros((2, N, R)), 20, np.random.default_rng(0)).plain()
    assert found["value"] == [[None, None], [None, None]] == found["low"]
    assert joint(np.zeros((N, R)), drawn()).total == 0


def with_versions(root: Path, steps: list[int], lm_features: bool = False) -> Run:
    """A run whose DWM had a new version at some steps."""
    folder = write_run(root, "d", method="dwm", final=2.0)
    for number in range(1, len(steps) + 1):
        saved(folder / "dwm" / f"v{number}", seed=number, lm_features=lm_features)
    entries = [{"fraction": step / STEPS, "folder": f"v{number}"} for number, step in enumerate(steps, start=1)]
    (folder / "dwm" / "trajectory.json").write_text(json.dumps({"versions": entries}))
    return open_run(folder)


PHASES = [Span("early", 1, 3), Span("middle", 4, 6), Span("late", 7, 10)]


def test_the_version_in_the_middle_of_a_phase_stands_for_it(tmp_path: Path) -> None:
    run = with_versions(tmp_path, [3, 5, 8, 9])  # of 10 steps; the phases' middles are 2, 5 and 8.5
    assert [folder.name for folder in versions(run, PHASES)] == ["v1", "v2", "v3"]


def test_runs_without_a_dwm_that_could_weigh_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"weighting.method=loss has no DWM"):
        versions(open_run(write_run(tmp_path, "l", method="loss", final=2.0)), PHASES)
    with pytest.raises(DataError, match="lm_features"):
        versions(with_versions(tmp_path, [3], lm_features=True), PHASES)


@pytest.mark.parametrize(("batch", "rows"), [(8, 80), (32, 64), (40, 80)])
def test_probes_are_whole_batches(tmp_path: Path, batch: int, rows: int) -> None:
    run = write_run(tmp_path, "u", method="uniform", final=3.0)
    pool = load_manifest(open_run(run).config.data.train)
    found = probe_rows(pool, batch, np.random.default_rng(0))
    assert len(found) == len(set(found.tolist())) == rows <= pool.rows == 80


def test_a_pool_of_one_batch_cannot_be_redrawn(tmp_path: Path) -> None:
    run = write_run(tmp_path, "u", method="uniform", final=3.0)
    with pytest.raises(DataError, match="no two batches of 41"):
        probe_rows(load_manifest(open_run(run).config.data.train), 41, np.random.default_rng(0))
