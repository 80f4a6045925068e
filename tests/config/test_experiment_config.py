"""What an experiment's file may say, the grid that comes of it, and the runs that its cells are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ray_dwm.config import to_dict
from ray_dwm.config.experiment import Cell, grid, load_experiment, needed, run_config
from ray_dwm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/experiments.md"
TEXT = """
name: x
set: {lm.preset: tiny, train: {steps: 8, lr: 1e-4}, bilevel.warmup_steps: 1}
sizes:
  small: {}
  large: {set: {train.lr: 2e-4}}
seeds: [3, 4]
baseline: uniform
methods:
  replayed:
    sizes: [large]
    set: {dwm.mode: replay}
    needs: {dwm.trajectory: small/dwm}
    against: [dwm]
  uniform: {set: {weighting.method: uniform}}
  dwm: {label: DWM}
"""


def write(folder: Path, text: str = TEXT) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("file", sorted((ROOT / "configs/experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_experiments_are_sound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    cells = grid(experiment)
    assert re.search(rf"^\| `{file.stem}` \|.*\| {len(cells)} \|$", DOCS.read_text(), re.M), (
        "as docs/experiments.md says"
    )
    for cell in cells:
        config = run_config(experiment, cell, dict.fromkeys(needed(experiment, cell), "somewhere"))
        assert config.seed == cell.seed
    assert {method.set.get("dwm.control") for method in experiment.methods.values()} >= {"random", "shuffled"}


def test_the_grid_puts_what_is_needed_first(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path), ["repeat=dwm"])
    cells = [cell.path for cell in grid(experiment)]
    assert cells.index("small/dwm/seed-3") < cells.index("large/replayed/seed-3")
    assert "small/replayed/seed-3" not in cells
    # Two sizes of uniform, DWM and two null controls, one replay; for two seeds; and the first seed's DWMs again.
    assert len(cells) == len(set(cells)) == 2 * (2 * 4 + 1) + 2
    assert cells[-2:] == ["small/dwm/seed-3-again", "large/dwm/seed-3-again"]
    assert all("seed-3" in cell for cell in cells[:9])
    assert needed(experiment, Cell("large", "replayed", 4)) == {"dwm.trajectory": Cell("small", "dwm", 4)}


def test_what_is_more_special_wins_and_the_command_line_over_all(tmp_path: Path) -> None:
    overrides = ["train.steps=5", "storage=/s", "methods.dwm.set.dwm.lr=0.5", "seeds=7"]
    experiment = load_experiment(write(tmp_path), overrides)
    config = run_config(experiment, Cell("large", "dwm", 7), {})
    assert (config.train.steps, config.train.lr, config.dwm.lr, config.lm.preset) == (5, 2e-4, 0.5, "tiny")
    assert (config.seed, config.storage, config.tracking.group) == (7, "/s/x", "x/large/dwm")
    assert run_config(experiment, Cell("small", "dwm", 7), {}).train.lr == 1e-4
    assert experiment.folder == Path("/s/x")


def test_null_controls_come_by_themselves_on_the_baselines_data(tmp_path: Path) -> None:
    text = TEXT.replace(
        "{set: {weighting.method: uniform}}", "{set: {weighting.method: uniform, data.selection: dsir}}"
    )
    experiment = load_experiment(write(tmp_path, text))
    config = run_config(experiment, Cell("small", "null-shuffled", 3), {})
    assert (config.weighting.method, config.dwm.control, config.data.selection) == ("dwm", "shuffled", "dsir")
    assert experiment.methods["null-random"].is_null and not experiment.methods["dwm"].is_null
    assert set(load_experiment(write(tmp_path), ["nulls=false"]).methods) == {"replayed", "uniform", "dwm"}
    own = TEXT + "  mine: {set: {dwm.control: random}}\n"
    assert set(load_experiment(write(tmp_path, own)).methods) == {
        "replayed", "uniform", "dwm", "mine", "null-shuffled"
    }  # fmt: skip


def test_what_is_stored_is_the_same_experiment(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path), ["train.steps=5"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(to_dict(experiment), sort_keys=False))
    assert load_experiment(copy) == experiment


def test_one_size_is_named_by_its_preset(tmp_path: Path) -> None:
    text = "name: x\nset: {lm.preset: tiny}\nbaseline: a\nmethods: {a: {set: {weighting.method: uniform}}}\n"
    assert list(load_experiment(write(tmp_path, text)).sizes) == ["tiny"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "sedes:", "unknown configuration key sedes: did you mean seeds?"),
        ("label: DWM", "labell: DWM", "unknown configuration key methods.dwm.labell: did you mean methods.dwm.label?"),
        ("label: DWM", "label: uniform", "uniform is the label of more than one"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "seeds names 3 twice"),
        ("seeds: [3, 4]", "seeds: []", "seeds is empty"),
        ("name: x", "name: ..", "name is '..'"),
        ("baseline: uniform", "baseline: unyform", "baseline is 'unyform', and there is none of that name"),
        ("against: [dwm]", "against: [dmw]", "methods.replayed.against is 'dmw'"),
        ("against: [dwm]", "against: [replayed]", "names the method itself"),
        ("sizes: [large]", "sizes: [huge]", "methods.replayed.sizes is 'huge'"),
        ("small/dwm", "small/dwn", "methods.replayed.needs.dwm.trajectory is 'dwn'"),
        ("small/dwm", "tiny/dwm", "methods.replayed.needs.dwm.trajectory is 'tiny'"),
        ("dwm.trajectory: small", "dwm.trajectori: small", "did you mean dwm.trajectory?"),
        ("small/dwm", "replayed", "it would need itself, in a circle"),
        ("small/dwm", "small/replayed", "which is not in the grid: add small to methods.replayed.sizes"),
        ("{weighting.method: uniform}}", "{seed: 3}}", "seed cannot be set"),
        ("small: {}", "cells: {}", "sizes.cells: use letters"),
        ("{weighting.method: uniform}}", "{weighting.method: uniform}, sizes: small}", "uniform is not in size large"),
        ("set: {lm.preset", "set: 3 #", "set is '3': it must be a mapping"),
        ("sizes: [large]", "sizes: {large: 1}", "methods.replayed.sizes"),
    ],
)  # fmt: skip
def test_bad_files_are_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as raised:
        load_experiment(write(tmp_path, TEXT.replace(old, new, 1)))
    assert message in str(raised.value) and "x.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed=1", "an experiment has seeds"), ("nonsense", "not of the form"), ("repeat=nobody", "repeat is 'nobody'")],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path), [override])


def test_a_cells_wrong_setting_names_the_cell(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, TEXT.replace("train.lr: 2e-4", "train.rl: 2e-4")))
    with pytest.raises(
        ConfigError, match=r"large/dwm/seed-3: unknown configuration key train.rl: did you mean train.lr"
    ):
        run_config(experiment, Cell("large", "dwm", 3), {})
