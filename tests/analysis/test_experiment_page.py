"""What leaderboard.html shows besides its tables: how far weights can be trusted, what selecting did, the settings."""

from __future__ import annotations

import json
from pathlib import Path

from synthetic import make_shards
from synthetic_experiment import UNIFORM, finish, read
from test_data_card import record

from ray_dwm.analysis.experiment_page import sections
from ray_dwm.config.experiment import ExperimentConfig


def test_trust_time_and_settings_by_hand(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.6})
    finish(experiment, "loss", {0: 3.1})
    found = sections(read(experiment), ["test", "target"], [])
    # ESS is 7.5 of 8 in every step, both checks of a DWM are 0.99 and foresee the side.
    assert found["health"].rows == (
        ("DWM | learnt", "2", "0.990 ± 0.000", "100.0% ± 0.0%", "93.8% ± 0.0%", "93.8%", "10.0% ± 0.0%"),
        ("loss", "1", "", "", "93.8%", "93.8%", "10.0%"),
    )
    assert [title for title, _ in found["preferences"]] == ["DWM | learnt", "loss"]
    (settings,) = found["settings"]
    assert settings.header == ("key", "default", "uniform", "DWM | learnt", "loss")
    assert settings.rows[0] == ("weighting.method", "dwm", "uniform", "dwm", "loss")  # in this they differ
    assert not {"name", "seed", "storage", "data.train"} & {row[0] for row in settings.rows}
    assert found["selections"] == [] and found["tasks"] == [] and len(found["configs"]) == 3


def test_what_each_method_selected(
    experiment: ExperimentConfig,
    tmp_path: Path,
) -> None:
    finish(experiment, "uniform", UNIFORM)
    selected = tmp_path / "selected"
    make_shards(selected, good=30, noise=10)
    (selected / "selection.json").write_text(json.dumps(record("dsir", (30, 10))))
    finish(experiment, "dwm", {0: 2.5})
    path = experiment.folder / "tiny" / "dwm" / "seed-0" / "config.yaml"
    text = path.read_text()
    (before,) = [line for line in text.splitlines() if line.strip().startswith("train: ") and "/" in line]
    path.write_text(text.replace(before, f"  train: {selected}"))
    (table,) = sections(read(experiment), ["test"], [])["selections"]
    assert table.header == ("method", "good", "noise")
    assert table.rows == (("the pool", "50.0%", "50.0%"), ("DWM | learnt", "75.0%", "25.0%"))
