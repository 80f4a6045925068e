"""The verdict is arithmetic, and tells a loss as plainly as a win."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import STEPS, TOKENS, write_run

from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.verdict import format_table, tokens_to_reach, verdict
from ray_dwm.errors import UserError


@pytest.mark.parametrize(
    ("dwm_final", "winner", "reached"),
    # From 4 to 2 in a straight line, uniform's 3 lies half way; from 4 to 3.5 it is never reached.
    [(2.0, "DWM", f"{STEPS * TOKENS // 2:,}"), (3.5, "uniform", "not reached"), (3.0, "tie", f"{STEPS * TOKENS:,}")],
)
def test_win_loss_and_tie(tmp_path: Path, dwm_final: float, winner: str, reached: str) -> None:
    uniform = open_run(write_run(tmp_path, "u", method="uniform", final=3.0))
    dwm = open_run(write_run(tmp_path, "d", method="dwm", final=dwm_final))
    rows = {row.measure: row for row in verdict(uniform, dwm)}
    assert rows["target loss"].better == winner
    assert rows["target loss"].difference == f"{dwm_final - 3.0:+.4f}"
    assert rows["held-out loss (test)"].better == winner
    assert rows["tokens to uniform's final target loss"].weighted == reached
    assert rows["training time"].difference == "+10.0%"
    assert reached in format_table(list(rows.values()), dwm.label)


@pytest.mark.parametrize(("level", "expected"), [(5.0, 0.0), (3.9, 128.0), (3.75, 320.0), (2.9, None)])
def test_tokens_are_interpolated_between_evaluations(tmp_path: Path, level: float, expected: float | None) -> None:
    run = open_run(write_run(tmp_path, "u", method="uniform", final=3.0))
    got = tokens_to_reach(run, "val/target/loss", level)
    assert got == (None if expected is None else pytest.approx(expected))


def test_a_baseline_wins_under_its_own_name(tmp_path: Path) -> None:
    uniform = open_run(write_run(tmp_path, "u", method="uniform", final=3.0))
    baseline = open_run(write_run(tmp_path, "j", method="joint_update_aware", final=2.0))
    rows = verdict(uniform, baseline)
    assert rows[0].better == "joint_update_aware"
    assert (
        len({line.index(" joint_update_aware") for line in format_table(rows, baseline.label).splitlines()[1:4]}) == 1
    )


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "u", method="uniform", final=3.0)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"has no summary.json"):
        open_run(folder)
