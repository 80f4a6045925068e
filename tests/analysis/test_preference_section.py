"""Numbers in words, and the section in the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from local import sweep
from test_preferences import diverse_late, planted
from test_report import outline

from ray_dwm.analysis.preference_section import joint, verdict
from ray_dwm.analysis.preferences import Asked, preferences
from ray_dwm.analysis.report import write_report

SHARES = {"loss": {"share": 0.25, "p": 0.2}, "domain a": {"share": 0.5, "p": 0.01}, "dsir": {"share": None, "p": 1.0}}


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (0.05, "The phases do not differ beyond chance: p = 0.05."),
        (
            0.0005,
            "The phases differ beyond chance: p = 0.0005; most in domain a, where 50 % of the variance between steps "
            "lies between phases.",
        ),
    ],
)
def test_the_verdict(p: float, said: str) -> None:
    assert verdict({"p": p, "of": SHARES}) == said


def test_the_joint_effect() -> None:
    of_phase = {"sequence": 0.9, "batch": 0.08, "company": 0.02}
    probe: dict[str, Any] = {"batch": 64, "joint": {"early": dict.fromkeys(of_phase, 0.0), "late": of_phase}}
    assert joint(probe) == (
        "Weighed again in random batches of 64, of the variance of a sequence's log weight 2 % (late) lie in how it is "
        "judged in its company; late, 8 % lie in the level of the batch and the rest in the sequence itself."
    )
    probe["joint"]["late"] = {"sequence": 1.0, "batch": 0.0, "company": 1e-6}
    assert "less than 0.1 % (late) lie in how" in joint(probe)
    probe["joint"].pop("late")
    assert joint(probe) == "The DWM weighed all of the probe alike."
    assert joint(None) == ""


def test_the_section_of_a_run(tmp_path: Path) -> None:
    run = planted(tmp_path, diverse_late)
    numbers = preferences(run, Asked(), partial(sweep, default=37))
    write_report([run.folder], tmp_path / "with.html", {run.folder: numbers})
    write_report([run.folder], tmp_path / "without.html", {run.folder: "too <short>"})
    for name, figures in (("with", 2), ("without", 0)):
        page, text = outline(tmp_path / f"{name}.html"), (tmp_path / f"{name}.html").read_text()
        assert "What it preferred, and when" in page.headings and page.fetched == []
        assert {"Early training, steps 1 to 12", "Late training, steps 25 to 36"} <= set(page.headings)
        assert text.count("<svg") - (tmp_path / "without.html").read_text().count("<svg") == figures
    text = (tmp_path / "with.html").read_text()
    assert "most in distinct tokens" in text and "Weight by domain" in text and "no reference LM was named" in text
    assert "was not computed: too &lt;short&gt;." in (tmp_path / "without.html").read_text()


def test_two_weighted_runs_have_a_section_each(tmp_path: Path) -> None:
    runs = [planted(tmp_path / name, diverse_late, method="loss") for name in ("a", "b")]
    write_report([run.folder for run in runs], tmp_path / "r.html")
    headings = outline(tmp_path / "r.html").headings
    assert {f"What it preferred, and when: {name}/runs/d" for name in "ab"} <= set(headings)
