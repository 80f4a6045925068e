"""A DWM that is given: frozen, replayed by its trajectory, adapted further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fitting import fitted
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import weights_from_scores
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.export import export_dwm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build
from ray_dwm.errors import DataError
from ray_dwm.models.folders import load_dwm


@pytest.fixture(scope="module")
def taught(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has learnt a DWM and left its trajectory."""
    root = tmp_path_factory.mktemp("taught")
    options = ["train.steps=8", "bilevel.every=1", "dwm.trajectory_points=4", "dwm.lr=0.03", "name=taught"]
    config = tiny_config(shards, root, *options)
    run(1, root / "p", fitted, config)
    return config


def applied(config: RunConfig) -> torch.Tensor:
    """Weights that training used, (steps, B)."""
    table = pq.read_table(config.run_dir / "weights")
    return torch.tensor(table["weight"].to_pylist()).view(-1, config.train.global_batch)


def expected_weights(config: RunConfig, folder: Path, step: int) -> torch.Tensor:
    """Of a plain forward of a DWM folder over the batch of a step, (B,)."""
    model, _ = load_dwm(folder)
    ids = pq.read_table(config.run_dir / "weights")["sample_id"].to_pylist()[step * 8 : (step + 1) * 8]
    reader = open_shards(config.data.train)
    rows = reader.take(np.arange(reader.manifest.rows))
    where = {int(key): row for row, key in enumerate(rows.sample_ids)}
    tokens = torch.from_numpy(rows.input_ids[[where[i] for i in ids]].astype("int64"))
    return 8 * weights_from_scores(model(tokens).detach())


def test_a_frozen_dwm_weighs_without_learning(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = sorted((taught.run_dir / "dwm").glob("v*"))[-1]
    config = tiny_config(shards, tmp_path, "dwm.mode=frozen", f"dwm.init_from={folder}")
    found = run(1, tmp_path / "p", fitted, config)
    weights = applied(config)
    for step in (0, 5):
        expected = expected_weights(config, folder, step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)
        assert float(expected.std()) > 1e-3
    assert not any("dwm/hypergrad_norm" in line for line in found["lines"])
    assert not (config.run_dir / "dwm").exists()


def test_a_trajectory_is_replayed_by_fraction_of_training(
    shards: dict[str, Path], tmp_path: Path, taught: RunConfig
) -> None:
    """Recorded after 2, 4, 6 and 8 of 8 steps, each first applied at the step before; replayed over 16."""
    trajectory = taught.run_dir / "dwm"
    entries = json.loads((trajectory / "trajectory.json").read_text())["versions"]
    assert [entry["fraction"] for entry in entries] == [0.0, 0.375, 0.625, 0.875]
    config = tiny_config(shards, tmp_path, "train.steps=16", "dwm.mode=replay", f"dwm.trajectory={trajectory}")
    found = run(1, tmp_path / "p", fitted, config)
    assert [line["dwm/version"] for line in found["lines"][1:]] == [1] * 6 + [2] * 4 + [3] * 4 + [4] * 2
    weights = applied(config)
    assert torch.equal(weights[3], torch.ones(8))
    for step, entry in ((6, entries[1]), (15, entries[3])):
        expected = expected_weights(config, trajectory / entry["folder"], step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)


def exported_at_the_end(config: RunConfig) -> None:
    """As a worker ends: what a kill after the last checkpoint has prevented is done again."""
    parts = build(config)
    Trainer(parts).fit()
    export_dwm(parts, check_data(config), config.train.steps)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("options", [["bilevel.every=1"], ["bilevel.every=3", "dwm.delay_steps=2"]])
def test_a_trajectory_holds_what_weighed_the_step_of_each_point(
    shards: dict[str, Path], tmp_path: Path, options: list[str], ahead: bool
) -> None:
    base = ["train.steps=8", "dwm.trajectory_points=4", "dwm.lr=0.03", f"dwm.look_ahead={ahead}", *options]
    config = tiny_config(shards, tmp_path, *base)
    used = [int(line["dwm/version"]) for line in run(1, tmp_path / "p", fitted, config)["lines"][1:]]
    folder, weights = config.run_dir / "dwm", applied(config)
    entries = json.loads((folder / "trajectory.json").read_text())["versions"]
    points = sorted({used[step] for step in (1, 3, 5, 7)})
    assert [(e["folder"], e["fraction"] * 8) for e in entries] == [(f"v{v:06d}", used.index(v)) for v in points]
    for entry in entries:
        step = round(entry["fraction"] * 8)
        expected = expected_weights(config, folder / entry["folder"], step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)
    newest = folder / entries[-1]["folder"]
    before = {file.name: file.read_bytes() for file in newest.iterdir()}
    shutil.rmtree(newest)
    run(1, tmp_path / "q", exported_at_the_end, config)
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == before
    assert json.loads((folder / "trajectory.json").read_text())["versions"] == entries


def test_learning_goes_on_from_a_given_dwm(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = sorted((taught.run_dir / "dwm").glob("v*"))[-1]
    given = ["dwm.mode=adapt", f"dwm.init_from={folder}"]
    config = tiny_config(shards, tmp_path, *given, "bilevel.every=1", "checkpoint.every=6")
    found = run(1, tmp_path / "p", fitted, config)
    torch.testing.assert_close(applied(config)[0], expected_weights(config, folder, 0), rtol=1e-4, atol=1e-4)
    assert found["lines"][-1]["dwm/version"] > 0
    adapted = json.loads((sorted((config.run_dir / "dwm").glob("v*"))[-1] / "config.json").read_text())
    assert adapted["learnt_on"] == {"lm": "tiny", "step": adapted["learnt_on"]["step"], "run": "run", "steps": 6}
    before = json.loads((folder / "config.json").read_text())
    assert adapted["started_from"] == {
        "version": before["version"],
        "learnt_on": before["learnt_on"],
        "started_from": None,
    }
    assert before["learnt_on"]["run"] == "taught"


def test_the_replays_overhead_is_the_forward_alone(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    given = ["dwm.mode=replay", f"dwm.trajectory={taught.run_dir / 'dwm'}"]
    lines = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *given))["lines"][1:]
    assert [line["seconds/bilevel"] for line in lines] == [0] * 6
    assert min(line["seconds/weigh"] for line in lines) > 0


def test_a_dwm_of_other_features_is_refused(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = tmp_path / "dwm"
    shutil.copytree(sorted((taught.run_dir / "dwm").glob("v*"))[-1], folder)
    content = json.loads((folder / "config.json").read_text())
    assert content["features"] == ["token_ids"]
    (folder / "config.json").write_text(json.dumps({**content, "features": ["token_ids", "grammar"]}))
    with pytest.raises(DataError, match=r"looks at \['token_ids', 'grammar'\], this version"):
        check_data(tiny_config(shards, tmp_path, "dwm.mode=frozen", f"dwm.init_from={folder}"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["dwm.mode=replay", "dwm.trajectory={dwm}/v000001"], "trajectory.json does not exist"),
        (["dwm.mode=frozen", "dwm.init_from={dwm}"], "not a readable DWM folder"),
        (["dwm.init_from={dwm}/none"], "not a readable DWM folder"),
    ],
)
def test_what_cannot_be_read_is_named(
    shards: dict[str, Path], tmp_path: Path, taught: RunConfig, options: list[str], reason: str
) -> None:
    config = tiny_config(shards, tmp_path, *[o.format(dwm=taught.run_dir / "dwm") for o in options])
    with pytest.raises(DataError, match=reason):
        run(1, tmp_path / "p", build, config)
