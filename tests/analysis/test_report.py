"""The report is whole, opens offline and shows what the run folders hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import STEPS, write_run

from ray_dwm.analysis.favoured import Texts, extremes
from ray_dwm.analysis.phases import spans, weighted_batches
from ray_dwm.analysis.report import standings, write_report
from ray_dwm.analysis.runs import open_run, open_runs
from ray_dwm.analysis.theme import INK
from ray_dwm.errors import UserError


class Outline(HTMLParser):
    """Headings of a page, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        if self._tag in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())
        self._tag = ""


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text())
    return parser


def test_report_of_a_pair_of_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "u", method="uniform", final=3.0), write_run(tmp_path, "d", method="dwm", final=2.0)]
    write_report(folders, tmp_path / "report.html")
    page = outline(tmp_path / "report.html")
    assert page.fetched == []
    for heading in ("Verdict", "Target set against tokens", "Target set against wall-clock", "Mean weight per domain"):
        assert heading in page.headings
    assert "Effective sample size and entropy" in page.headings
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 10  # two sets by two axes, domains, ESS, hypergradient, times, and two of the error
    for heading in (
        "Warnings",
        "Fidelity and overhead",
        "Data card",
        "Configuration",
        "What differs from the defaults",
    ):
        assert heading in page.headings
    assert (
        "DWM ends better than uniform weights on the target set: -1.0000 nats per token, a perplexity -63.2%." in text
    )
    assert "None: no low effective sample size" in text and "Not looked for: contamination." in text
    assert page.headings.count("train") == 1  # both runs have the same data
    assert "<script" not in text
    assert "Predicted and realised change of the target loss" in page.headings and "Fidelity" in page.headings
    assert len(re.findall(r'id="([^"]+)"', text)) == len(set(re.findall(r'id="([^"]+)"', text)))
    assert not list(tmp_path.glob("*.tmp"))


def test_report_of_a_baseline_has_its_name_and_no_hypergradient(tmp_path: Path) -> None:
    runs = [("u", "uniform", 3.0), ("l", "loss", 2.0)]
    write_report([write_run(tmp_path, n, method=m, final=f) for n, m, f in runs], tmp_path / "report.html")
    headings = outline(tmp_path / "report.html").headings
    assert "What loss preferred" in headings and "Hypergradient" not in headings
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 7 and '<span class="tag weighted">loss</span>' in text


def test_report_of_a_uniform_run_alone(tmp_path: Path) -> None:
    write_report([write_run(tmp_path, "u", method="uniform", final=3.0)], tmp_path / "report.html")
    headings = outline(tmp_path / "report.html").headings
    assert "Verdict" not in headings and "What the DWM preferred" not in headings
    assert {"Loss", "Overhead", "Data card"} <= set(headings)
    assert (tmp_path / "report.html").read_text().count("<svg") == 5


def test_report_of_three_runs_has_a_verdict_each_and_all_side_by_side(tmp_path: Path) -> None:
    runs = [("u", "uniform", 3.0), ("d", "dwm", 2.0), ("l", "loss", 3.5)]
    folders = [write_run(tmp_path, n, method=m, final=f) for n, m, f in runs]
    write_report(folders, tmp_path / "report.html")
    headings = outline(tmp_path / "report.html").headings
    assert [name for name in headings if name in ("d", "l", "All runs")] == ["d", "l", "All runs"]
    assert {"What the DWM preferred: d", "What loss preferred: l"} <= set(headings)
    table = standings([open_run(folder) for folder in folders])
    assert [row[:3] for row in table.rows] == [
        ("d", "DWM", "2.0000"),
        ("u", "uniform", "3.0000"),
        ("l", "loss", "3.5000"),
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [("a", "uniform", 3.0), ("b", "loss", 3.5)]
    folders = [write_run(tmp_path / place, "seed-0", method=m, final=f) for place, m, f in runs]
    assert [run.name for run in open_runs(folders[:1])] == ["seed-0"]
    names = ["a/runs/seed-0", "b/runs/seed-0"]
    assert [run.name for run in open_runs(folders)] == names
    write_report(folders, tmp_path / "report.html")
    assert " and ".join(names) in outline(tmp_path / "report.html").headings
    with pytest.raises(UserError, match="is named twice"):
        open_runs([folders[0], folders[0]])


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    write_report([write_run(tmp_path, "d", method="dwm", final=2.0)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    used = set(re.findall(r"var\(--([a-z0-9]+), #[0-9a-f]{6}\)", text))
    assert {"ink", "line", "axis", "c0"} <= used
    light, dark = text.split("prefers-color-scheme: dark")
    for name in used:
        assert f"--{name}: #" in light and f"--{name}: #" in dark.split("</style>")[0]
    assert not re.search(f"(fill|stroke): {INK}", text)


def test_phases_hold_the_extremes_of_each_third(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, "d", method="dwm", final=2.0))
    batches = weighted_batches(run)
    found = extremes(batches, spans(run.config, batches.steps_S), Texts(run.config.data.train), count=2)
    assert [phase.name for phase in found] == ["early", "middle", "late"]
    assert found[0].first_step == 1 and found[-1].last_step == STEPS
    for phase in found:
        # At most one of the two from a domain: the largest weights are 15/8 (noise) and 13/8 (good).
        assert [(s.weight, s.domain) for s in phase.most] == [(15 / 8, "noise"), (13 / 8, "good")]
        assert [(s.weight, s.domain) for s in phase.least] == [(1 / 8, "good"), (3 / 8, "noise")]


def test_text_of_a_run_cannot_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "d", method="dwm", final=2.0)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("project: ray_dwm", 'project: "<script>alert(1)</script>"'))
    write_report([folder], tmp_path / "report.html")
    assert "<script>" not in (tmp_path / "report.html").read_text()
