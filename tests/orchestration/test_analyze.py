"""Preferences as a job: the same as in one process, kept, and refused in one line where they cannot be measured."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local import sweep
from synthetic_runs import write_run
from test_preferences import diverse_late, planted, reference_lm

from ray_dwm.analysis.preferences import Asked, preferences
from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import open_run
from ray_dwm.cli import main
from ray_dwm.data.records import read_json
from ray_dwm.engine.rundir import data_digests
from ray_dwm.errors import UserError
from ray_dwm.orchestration.analyze import Analysis, analyze, apart, preferences_of


@pytest.mark.slow
@pytest.mark.usefixtures("driver")
def test_preferences_of_a_pair_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted(tmp_path, diverse_late)
    partner = uniform(tmp_path)
    shutil.copytree(reference_lm(tmp_path), partner / "hf")
    asked = Analysis(output=tmp_path / "report.html", samples=500, numbers=tmp_path / "numbers.json")
    analyze([partner, run.folder], asked)
    kept = read_json(run.folder / "preferences.json")
    local = preferences(run, Asked(samples=500, reference=str(partner / "hf")), partial(sweep, default=30))
    for name, value in local.items():
        if name not in ("features", "features_within_domains"):  # whose last bits depend on the size of blocks
            assert kept[name] == value, name
    assert kept["features"].keys() == local["features"].keys() > {"reference_perplexity", "dsir"}
    late = kept["features"]["reference_perplexity"]["late"]["value"]
    assert late == pytest.approx(local["features"]["reference_perplexity"]["late"]["value"], abs=1e-3)
    assert kept["reference"] == str(partner) and kept["versions"].keys() >= {"ray-dwm", "ray"}
    assert read_json(tmp_path / "numbers.json") == {str(run.folder): kept}
    text = (tmp_path / "report.html").read_text()
    assert "What it preferred, and when" in text and "The phases differ beyond chance: p = " in text
    assert not list(run.folder.glob(".*.work"))

    capsys.readouterr()
    assert preferences_of(run, asked, str(partner)) == kept
    assert "preferences are there already" in capsys.readouterr().out
    others = preferences_of(run, Analysis(output=tmp_path / "r.html", samples=500, seed=1), str(partner))
    assert others["phases_differ"] != kept["phases_differ"] and others["depends_on"] != kept["depends_on"]
    assert read_json(run.folder / "preferences.json") == others


def uniform(root: Path) -> Path:
    return write_run(root, "u", method="uniform", final=3.0)


def unlearnt(root: Path) -> Path:
    return planted(root, lambda step, rows: np.zeros(len(rows))).folder


def short(root: Path) -> Path:
    return write_run(root, "short", method="dwm", final=2.0)


def foreign(root: Path) -> Path:
    run = planted(root, diverse_late)
    digests = {**data_digests(run.config), "train": "0" * 64}
    (run.folder / "data.json").write_text(json.dumps(digests))
    return run.folder


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (short, {}, "3 weighted steps are recorded of phase early (steps 1 to 3), an interval needs 10"),
        (short, {"overrides": ("train.steps=3",)}, "only selection.* can be set"),
        (short, {"reference": "nowhere"}, "--reference: nowhere is neither a finished run folder nor"),
        (unlearnt, {}, "are uniform: nothing was preferred"),
        (foreign, {}, "the shards of train are not those that"),
        (uniform, {"numbers": "n.json"}, "name a run with weights"),
    ],
    ids=["short", "override", "reference", "unlearnt", "shards", "uniform"],
)
def test_what_cannot_be_measured_is_told_before_anything_starts(
    tmp_path: Path, make: Any, options: dict[str, Any], message: str
) -> None:
    folder = make(tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    numbers = tmp_path / options.pop("numbers") if "numbers" in options else None
    with pytest.raises(UserError) as raised:
        analyze([folder], Analysis(output=tmp_path / "report.html", numbers=numbers, **options))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(path.name for path in folder.iterdir()) == before and not (tmp_path / "report.html").exists()


def test_folders_and_overrides_stand_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert apart(["x", "selection.tasks=4", str(folder)]) == ([Path("x"), folder], ("selection.tasks=4",))
    with pytest.raises(UserError, match="no run folder is named"):
        apart(["selection.tasks=4"])


def test_a_report_without_preferences_of_a_short_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, report = short(tmp_path), tmp_path / "report.html"
    write_report([unlearnt(tmp_path / "unlearnt")], report)
    assert "Early training" not in report.read_text()
    for arguments, code in ((["--no-preferences"], 0), ([], 2), (["selection.tasks=1"], 2), (["no=folder"], 2)):
        monkeypatch.setattr("sys.argv", ["ray-dwm", "analyze", str(run), "--output", str(report), *arguments])
        try:
            main()
        except SystemExit as ended:
            assert (ended.code or 0) == code, capsys.readouterr()
    text = report.read_text()
    assert "was not computed: it was not asked for" in text and "What it preferred, and when" in text
    assert not open_run(run).folder.joinpath("preferences.json").exists()
