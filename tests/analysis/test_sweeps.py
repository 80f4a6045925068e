"""A sweep's numbers: fronts, the best within a cap, agreement of scales, and the report of all of it."""

from __future__ import annotations

from typing import Any

import pytest

from ray_dwm.analysis.tuning import Row, Trial, agreement, best, done, finished, pareto, recommended
from ray_dwm.analysis.tuning_report import html, markdown


def trial(name: str, loss: float | None, overhead: float | None, state: Any = "done", **more: Any) -> Trial:
    return Trial(id=name, loss=loss, overhead=overhead, state=state, **more)


TRIALS = [
    trial("uniform", 4.0, 0.0, control="uniform"),
    trial("defaults", 3.5, 0.10, control="defaults"),
    trial("a", 3.0, 0.30),
    trial("b", 3.2, 0.20),
    trial("c", 3.3, 0.25),
    trial("d", 2.0, 0.01, "ended early"),
    trial("e", None, None, "failed", reason="no memory"),
    trial("f", None, None, "waiting"),
]


def test_only_what_was_trained_to_its_end_is_ranked() -> None:
    assert [t.id for t in done(TRIALS)] == ["a", "b", "c", "defaults", "uniform"]
    assert {t.id for t in TRIALS} - {t.id for t in finished(TRIALS)} == {"f"}


def test_the_front_holds_what_nobody_beats_in_both() -> None:
    assert [t.id for t in pareto(TRIALS)] == ["a", "b", "defaults", "uniform"]
    same = [trial("x", 1.0, 0.1), trial("y", 1.0, 0.1), trial("z", 1.0, 0.2)]
    assert [t.id for t in pareto(same)] == ["x", "y"]
    assert pareto([]) == []


@pytest.mark.parametrize(
    ("number", "cap", "expected"),
    [(2, 0.0, ["a", "b"]), (9, 0.0, ["a", "b", "c"]), (2, 0.25, ["b", "c"]), (1, 0.05, []), (0, 0.0, [])],
)
def test_the_best_are_searched_trials_within_the_cap(number: int, cap: float, expected: list[str]) -> None:
    assert [t.id for t in best(TRIALS, number, cap)] == expected


def test_scales_agree_by_ranks_over_what_both_have() -> None:
    before = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "only here": 0.0}
    found = agreement("s", before, "l", {"a": 10.0, "b": 30.0, "c": 20.0, "d": 40.0})
    assert found.settings == ["a", "b", "c", "d"]
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert agreement("s", before, "l", {"a": 1.0, "b": 2.0}).spearman is None
    assert agreement("s", before, "l", {"a": 1.0, "b": 1.0, "c": 1.0}).spearman is None


def test_what_is_recommended_lies_within_the_cap() -> None:
    rows = [
        Row(trial="a", how="learn", loss=2.0, overhead=0.3, seeds=1),
        Row(trial="a", how="replay", loss=2.1, overhead=0.02, seeds=1),
        Row(trial="uniform", how="uniform", loss=3.0, overhead=0.0, seeds=1),
    ]
    assert recommended(rows, 0.0) is rows[0]
    assert recommended(rows, 0.05) is rows[1]
    assert recommended(rows, 0.01) is rows[2]


def content(**more: Any) -> dict[str, Any]:
    values = [{"bilevel.every": every, "dwm.size": size} for every, size in ((1, "xs"), (4, "s"), (16, "xs"))]
    trials = [
        {
            "id": f"000{k}",
            "control": "",
            "values": v,
            "state": "done",
            "loss": 3.0 + k,
            "overhead": 0.1 * k,
            "reason": "",
        }
        for k, v in enumerate(values)
    ]
    failed = {"id": "0009", "control": "", "values": {}, "state": "failed", "loss": None, "overhead": None}
    row = {"trial": "0000", "how": "replay", "loss": 2.5, "overhead": 0.01, "seeds": 1}
    return {
        "sweep": "x",
        "measure": "target",
        "sampler": "tpe",
        "seed": 0,
        "max_overhead": 0.2,
        "space": {"bilevel.every": "int from 1 to 16, log", "dwm.size": "one of xs, s"},
        "log": ["bilevel.every"],
        "scales": ["small", "large"],
        "trials": [*trials, {**failed, "reason": "a <b> | reason"}],
        "pareto": ["0000"],
        "importance": {"loss": {"bilevel.every": 0.75, "dwm.size": 0.25}},
        "stages": [{"scale": "large", "rows": [row]}],
        "correlations": [{"scale": "small", "following": "large", "settings": ["0000"], "spearman": None}],
        "recommended": {"scale": "large", "values": values[0], **row},
        "device": "a device",
        "versions": {"ray": "2"},
        **more,
    }


def test_the_report_says_what_was_found() -> None:
    told = markdown(content())
    assert "| 0000 | 1 | xs | 3.0000 | 0.0% | yes | done |" in told
    assert "| bilevel.every | 75% |" in told
    assert "| 0000 | the scale before's DWMs, replayed | 2.5000 | 1.0% | 1 |" in told
    assert "Recommended at scale large: trial 0000" in told and "bilevel.every=1, dwm.size=xs" in told
    assert "- Trial 0009 failed: a <b> | reason" in told
    assert "tasks of scale large: scale-large/leaderboard.html." in told
    page = html(content())
    assert "a &lt;b&gt;" in page and "<svg" in page and "bilevel." in page


def test_a_report_without_importances_and_figure_says_so() -> None:
    empty = content(importance={}, trials=[], pareto=[], stages=[], correlations=[])
    assert "No importances: they need four trials" in markdown(empty)
    assert "<svg" not in html(empty)
