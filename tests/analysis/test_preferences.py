"""From a run folder to numbers: what was planted in the weights comes out, in its phase and with its sign."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lms import tiny_lm
from local import sweep
from synthetic_runs import plant_weights, write_run
from test_dwm_scores import saved

from ray_dwm.analysis.features import FEATURES, distinct
from ray_dwm.analysis.preferences import Asked, preferences
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.data.shards import Rows
from ray_dwm.errors import DataError
from ray_dwm.selection.perplexity import LogLikelihoods

STEPS = 36


def planted(root: Path, log_weight: Callable[[int, Rows], np.ndarray], *overrides: str, method: str = "dwm") -> Run:
    options = (f"train.steps={STEPS}", "train.global_batch=16", *overrides)
    run = open_run(write_run(root, "d", *options, method=method, final=2.0))
    plant_weights(run.config, log_weight)
    return run


def diverse_late(step: int, rows: Rows) -> np.ndarray:
    """Noise at first, in the last third distinct tokens."""
    noise = np.random.default_rng(step).standard_normal(len(rows))
    return 30 * distinct(rows.input_ids) + 0.1 * noise if step > 2 * STEPS // 3 else noise


def found(run: Run, **asked: Any) -> dict[str, Any]:
    return preferences(run, Asked(**asked), partial(sweep, default=37))


def test_a_preference_that_comes_late(tmp_path: Path) -> None:
    numbers = found(planted(tmp_path, diverse_late))
    rho = numbers["features"]["distinct_1"]
    assert rho["late"]["low"] > 0.8
    assert rho["early"]["low"] < 0 < rho["early"]["high"] and rho["middle"]["low"] < 0 < rho["middle"]["high"]
    differ = numbers["phases_differ"]
    assert differ["p"] == differ["of"]["distinct_1"]["p"] < 0.01
    phases = [(p["name"], p["first_step"], p["last_step"], p["steps"], p["sequences"]) for p in numbers["phases"]]
    assert phases == [("early", 1, 12, 12, 192), ("middle", 13, 24, 12, 192), ("late", 25, 36, 12, 192)]
    assert numbers["phases"][2]["most"][0]["weight"] > numbers["phases"][2]["least"][0]["weight"]
    json.dumps(numbers, allow_nan=False)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    numbers = found(planted(tmp_path, diverse_late))
    assert numbers["left_out"] == {
        "bytes_per_token": "the shards hold no tokenizer",
        "compression_ratio": "the shards hold no tokenizer",
        "reference_perplexity": "no reference LM was named (--reference)",
        "source": "all sequences come from one file",
        "probe": numbers["left_out"]["probe"],
    }
    assert "trajectory.json does not exist" in numbers["left_out"]["probe"] and numbers["probe"] is None
    names = {feature.name for feature in FEATURES}
    assert names == numbers["features"].keys() | (names & numbers["left_out"].keys())
    assert {"dsir", "target_cosine"} <= numbers["features"].keys()
    without = planted(tmp_path / "no", diverse_late, "data.target=", method="loss")
    assert found(without)["left_out"]["dsir"] == "the run has no target set"


def test_a_seed_decides_all_chance(tmp_path: Path) -> None:
    run = planted(tmp_path, diverse_late)
    one, again, other = (found(run, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert one["features"]["rarity"]["late"]["value"] == pytest.approx(other["features"]["rarity"]["late"]["value"])


def test_the_probe_of_a_learnt_dwm(tmp_path: Path) -> None:
    run = planted(tmp_path, diverse_late)
    saved(run.folder / "dwm" / "v1", seed=1, bag=0.0)
    saved(run.folder / "dwm" / "v2", seed=1, bag=2.0)
    entries = [{"fraction": at, "folder": name} for at, name in ((0.0, "v1"), (0.6, "v2"))]
    (run.folder / "dwm" / "trajectory.json").write_text(json.dumps({"versions": entries}))
    probe = found(run)["probe"]
    assert probe["versions"] == {"early": "v1", "middle": "v1", "late": "v2"}
    assert (probe["sequences"], probe["batch"], probe["draws"]) == (80, 16, 16)
    value = np.array(probe["stability"]["value"])
    assert value[0, 1] == value[0, 0] > 0.9 > value[0, 2]  # the same version, and another one
    assert probe["joint"]["early"] == probe["joint"]["middle"] != probe["joint"]["late"]
    assert 0 < probe["joint"]["late"]["company"] < probe["joint"]["late"]["sequence"]


def test_the_perplexity_of_a_reference_lm(tmp_path: Path) -> None:
    """Weights that are lower the higher the perplexity is, by an LM that is the same."""
    folder = reference_lm(tmp_path)
    score = LogLikelihoods((str(folder),), 16)
    run = planted(tmp_path, lambda step, rows: 20 * score(rows)["score"])
    numbers = found(run, reference=str(folder))
    assert all(e["value"] < -0.99 for e in numbers["features"]["reference_perplexity"].values())
    assert "reference_perplexity" not in numbers["left_out"]


def reference_lm(root: Path) -> Path:
    """An LM that knows a little of the target set that the synthetic runs have."""
    write_run(root / "for_lm", "u", method="uniform", final=3.0)
    tiny_lm(root / "for_lm" / "shards" / "target", steps=20).save_pretrained(root / "lm")
    return root / "lm"


@pytest.mark.parametrize(("bad", "loss"), [(np.nan, "nan"), (0.0, r"4\.159")])
def test_a_reference_lm_that_knows_nothing(tmp_path: Path, bad: float, loss: str) -> None:
    lm = tiny_lm()
    lm.model.norm.weight.data[:] = bad
    lm.save_pretrained(tmp_path / "broken")
    with pytest.raises(DataError, match=f"has a loss of {loss} nats a token, guessing has 4.159"):
        found(planted(tmp_path, diverse_late), reference=str(tmp_path / "broken"))


def test_shards_that_are_others_now(tmp_path: Path) -> None:
    run = planted(tmp_path, diverse_late)
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "shards" / "train"), run.config.data.target))
    with pytest.raises(DataError, match=r"has no sample \d+, which .* has weighed"):
        found(open_run(run.folder))
