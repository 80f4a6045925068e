"""Each warning at its threshold, on both sides, and whose it is in a report and in an experiment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_runs import STEPS, write_run

from ray_dwm.analysis import cautions
from ray_dwm.analysis.cautions import Caution
from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.statistics import Interval
from ray_dwm.evaluation.contamination import Overlap
from ray_dwm.evaluation.scores import keep


@pytest.mark.parametrize(
    ("ess", "said"),
    # B = 11: shares (ESS - 1) / 10; the guard at 0.05 warns below 0.1.
    [([5.0, 2.0], ""), ([5.0, 1.9, 1.8], "step 3, ESS was at 8.0% of its range; it was low in 2 of 3 steps")],
)
def test_low_ess(ess: list[float], said: str) -> None:
    found = cautions.low_ess(range(1, len(ess) + 1), ess, batch=11, guard=0.05)
    assert (found is not None) == bool(said)
    assert found is None or (said in found.found and "below 0.1, 2 times" in found.rule)


@pytest.mark.parametrize(
    ("values", "least", "warned"),
    [([], 0.0, False), ([0.1, 0.8, 0.9], 0.0, False), ([0.9, 0.79, 0.7], 0.0, True), ([0.9], 0.95, True)],
)
def test_low_fidelity_is_about_the_median(values: list[float], least: float, warned: bool) -> None:
    assert (cautions.low_fidelity(values, least) is not None) == warned


FALLING = {0: 4.0, 5: 3.0, 10: 2.0}


@pytest.mark.parametrize(
    ("target", "held_out", "warned"),
    [
        (FALLING, {0: 4.0, 5: 3.0, 10: 3.02}, True),
        (FALLING, {0: 4.0, 5: 3.0, 10: 3.005}, False),  # less than the threshold
        ({0: 4.0, 5: 2.0, 10: 2.5}, {0: 4.0, 5: 3.0, 10: 3.5}, False),  # both worsen: it is not the target's doing
        (FALLING, FALLING, False),
        (FALLING, {}, False),
    ],
)
def test_a_held_out_loss_that_turns(target: dict[float, float], held_out: dict[float, float], warned: bool) -> None:
    found = cautions.turned("test", target, held_out)
    assert (found is not None) == warned
    assert found is None or found.found == (
        "since step 5 the loss on test rose by 0.0200 nats per token, while the target loss fell by 1.0000"
    )


@pytest.mark.parametrize(
    ("target", "held_out", "named"),
    [(2.9, 3.1, ["a"]), (2.9, 3.005, []), (3.0, 3.1, []), (3.1, 3.1, [])],
)
def test_a_target_at_the_price_of_another_set(target: float, held_out: float, named: list[str]) -> None:
    found = cautions.traded({"target": 3.0, "a": 3.0, "b": 3.0}, {"target": target, "a": held_out}, ["a", "b"])
    assert ["a" for one in found if "that on a" in one.found] == named and len(found) == len(named)


def test_over_seeds_intervals_decide() -> None:
    better, worse, unclear = (Interval(3, m, m - 0.1, m + 0.1) for m in (-0.5, 0.2, 0.05))
    found = cautions.traded_over_seeds(better, {"a": worse, "b": unclear, "c": better})
    assert [one.found for one in found] == [
        "against the baseline the target loss is 0.5000 nats per token lower, that on a 0.2000 higher"
    ]
    assert cautions.traded_over_seeds(unclear, {"a": worse}) == []
    assert cautions.traded_over_seeds(Interval(1, -0.5, None, None), {"a": worse}) == []


def overlap(what: str, overlapping: int) -> Overlap:
    return Overlap(what=what, against="train", items=300, judged=200, overlapping=overlapping, words=13, of=what)


def test_contamination_above_its_threshold() -> None:
    found = cautions.contaminated([overlap("test", 4), overlap("target", 2)])
    assert [(one.found, one.rule) for one in found] == [
        ("2.00% of test are also in train: its figures flatter", "overlap above 1.00%")
    ]


def test_seeds_are_counted_for_each_pair_of_sets() -> None:
    """Else the second seed's held-out set would be counted for the first's target set."""
    both, one = (
        cautions.contaminated([overlap(what, 100) for what in names]) for names in (("target", "test"), ("test",))
    )
    assert [found.found.partition(" are")[0] for found in cautions._merged([both, one])] == [
        "in 1 of 2 seeds; 50.00% of target",
        "in 2 of 2 seeds; 50.00% of test",
    ]


@pytest.mark.parametrize(("times", "said"), [(1.0, None), (1.5, "1.50 times"), (5.0, "5.00 times, and beyond 4 that")])
def test_data_that_ran_out(times: float, said: str | None) -> None:
    found = cautions.repeated("the run", times)
    assert (found is None and said is None) or (found is not None and said is not None and said in found.found)


def test_what_the_run_said() -> None:
    lines = ["[d] warning: weights concentrate", "[d] every = 7 was chosen", "[d] warning: weights concentrate"]
    assert [one.found for one in cautions.said(lines)] == ["weights concentrate"]


def test_warnings_of_runs_and_pairs(tmp_path: Path) -> None:
    uniform = write_run(tmp_path, "u", method="uniform", final=3.0)
    dwm = write_run(tmp_path, "d", "dwm.min_ess_fraction=0.5", method="dwm", final=2.0)
    summary = json.loads((dwm / "summary.json").read_text())
    summary["final"]["val/test/loss"] = 3.5
    (dwm / "summary.json").write_text(json.dumps(summary))
    (dwm / "messages.log").write_text("[d] warning: look\n")
    keep(dwm, None, [overlap("sea", 100)])
    runs = [open_run(uniform), open_run(dwm)]
    found = cautions.of_runs(runs, runs[0])
    # 8 sequences a step of 80; ESS 7.5 of 8 is above the guard but not above twice that.
    assert [(whose, one.title) for whose, one in found] == [
        ("d", "Low effective sample size"),
        ("d", "Contamination"),
        ("d", "Said during the run"),
        ("d", "Target overfitted"),
    ]


def test_the_same_is_shown_once() -> None:
    one, other = Caution("T", "f", "r"), Caution("T", "g", "r")
    groups = cautions.grouped([("a", one), ("b", one), ("b", other), ("c", Caution("T", "f", "s"))])
    assert [(group.rule, group.found) for group in groups] == [
        ("r", {"f": ["a", "b"], "g": ["b"]}),
        ("s", {"f": ["c"]}),
    ]


def test_epochs_of_a_run(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, "u", "train.global_batch=16", method="uniform", final=3.0))
    assert [one.found for one in cautions.of_run(run)] == [f"the run read its sequences {STEPS * 16 / 80:.2f} times"]
