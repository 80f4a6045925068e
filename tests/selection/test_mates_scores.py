"""MATES without a cluster: what the LM of a checkpoint needs is found in the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo import run
from local import task
from synthetic import make_shards, tiny_config
from test_invariants import train

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError
from ray_dwm.selection import mates
from ray_dwm.selection.choose import drawn
from ray_dwm.selection.influence import standardised
from ray_dwm.selection.scores import Keyed, gather

STEPS = 6
POOL = {"good": 160, "noise": 160}


def select(config: RunConfig, pool: Path, targets: dict[str, Path], looks: int) -> dict[str, Any]:
    """A run's LM is trained for a moment, and then asked."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    train(config)
    job = task(pool, targets, mates={"probes": 120, "probe_targets": 16, "size": "xs", "lr": 3e-3}, temperature=0.3)
    look = mates.look_of(config.run_dir / "hf")
    assert look == (str(config.run_dir), STEPS)
    scorer = mates.learn(job, [look] * looks, np.arange(job.pool.rows), 16)
    scored = gather(job.sweep("", str(pool), Keyed(scorer)), job.pool)
    return {"scored": scored, "rows": drawn(job, scored, 100), "notes": job.notes}


@pytest.mark.slow
@pytest.mark.parametrize("looks", [1, 2])
def test_what_helps_the_lm_is_found(shards: dict[str, Path], tmp_path: Path, looks: int) -> None:
    make_shards(tmp_path / "pool", **POOL, seed=5)
    config = tiny_config(shards, tmp_path / "runs", "weighting.method=uniform", f"train.steps={STEPS}")
    found = run(1, tmp_path / "p", select, config, tmp_path / "pool", {"target": shards["target"]}, looks)
    names = open_shards(str(tmp_path / "pool")).manifest.domain_names
    good = found["scored"].domains == names.index("good")
    assert found["notes"]["spearman"] > 0.4 and found["notes"]["probes"] == 120
    assert found["scored"].scores[good].mean() > found["scored"].scores[~good].mean() + 0.5
    assert good[found["rows"]].sum() > 75, "of 100 rows, where half of the pool is good"


def test_probes_are_some_of_the_candidates() -> None:
    candidates = np.arange(10, 60, 2)
    found = mates._drawn(candidates, 7, seed=1)
    assert len(set(found.tolist())) == 7 and set(found.tolist()) <= set(candidates.tolist())
    assert (np.diff(found) > 0).all()
    np.testing.assert_array_equal(mates._drawn(candidates, 7, seed=1), found)
    np.testing.assert_array_equal(mates._drawn(candidates, 99, seed=1), candidates)


def test_lms_count_the_same_however_far_a_step_moves_them() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 9.0, 4.0]), np.array([0.5, np.nan, 0.1, 0.2, 0.3])
    found = mates._combined(np.stack([first, 1e-6 * second], axis=1))
    np.testing.assert_allclose(found, (standardised(first) + standardised(second)) / 2)


def test_an_lm_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"proxy LM .*/hf has no checkpoint beside it") as raised:
        mates.look_of(tmp_path / "hf")
    assert "\n" not in str(raised.value)
