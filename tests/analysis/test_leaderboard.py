"""The leaderboard is arithmetic over run folders: known answers, both outcomes, and what is missing is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from synthetic_experiment import UNIFORM, finish, read, write_cell
from synthetic_runs import STEPS, TOKENS
from test_report import outline

from ray_dwm.analysis.comparison import compare
from ray_dwm.analysis.grid import EXPERIMENT, read_grid, record_path
from ray_dwm.analysis.leaderboard import build_board
from ray_dwm.analysis.publish import write_leaderboard
from ray_dwm.config import to_dict
from ray_dwm.config.experiment import Cell, ExperimentConfig
from ray_dwm.errors import UserError


def test_differences_and_shares_by_hand(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58, 2: 2.72})
    found = compare(read(experiment), "tiny", "dwm", "uniform")
    assert found is not None and found.seeds == (0, 1, 2)
    # Differences -0.50, -0.52, -0.48: deviation 0.02, times 4.3027 / sqrt(3).
    assert found.at_tokens.interval.mean == pytest.approx(-0.5)
    assert found.at_tokens.interval.half == pytest.approx(0.0497, abs=1e-4)
    assert found.at_tokens.p_signs == 0.25
    # A straight line from 4.1 passes uniform's last loss after (4 - u) / (4 - d) of its way.
    shares = [1 / 1.5, 0.9 / 1.42, 0.8 / 1.28]
    assert found.tokens.share is not None and found.wall.share is not None
    assert found.tokens.share.mean == pytest.approx((shares[0] * shares[1] * shares[2]) ** (1 / 3))
    assert found.wall.share.mean == pytest.approx(1.1 * found.tokens.share.mean)
    # When uniform has ended, the slower one has gone 10/11 of its way.
    gaps = [(4 - d) * 10 / 11 for d in (2.5, 2.58, 2.72)]
    mean = sum(u - 4 + gap for u, gap in zip(UNIFORM.values(), gaps, strict=True)) / 3
    assert found.at_wall.interval.mean == pytest.approx(-mean)


def test_a_level_that_is_not_reached_has_no_share(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "loss", {0: 2.9, 1: 3.5, 2: 3.5})
    found = compare(read(experiment), "tiny", "loss", "uniform")
    assert found is not None
    assert (found.tokens.reached, found.tokens.of, found.tokens.share) == (1, 3, None)


def test_wall_clock_has_selecting_proxies_and_needed_runs(experiment: ExperimentConfig, tmp_path: Path) -> None:
    finish(experiment, "uniform", UNIFORM)
    selection, proxy = tmp_path / "selection", tmp_path / "proxy"
    for folder in (selection, proxy):
        folder.mkdir()
    (proxy / "summary.json").write_text(json.dumps({"train_seconds": 15.0}))
    # 20 s in all, of which 12 were waited for a proxy LM that took 15 s to train; the other was given.
    record = {"seconds": 20.0, "proxy_seconds": 12.0, "folders": {"proxies": [str(proxy / "hf"), "/given/hf"]}}
    (selection / "selection.json").write_text(json.dumps(record))
    path = "tiny/uniform/seed-0"
    write_cell(experiment, Cell("tiny", "loss", 0), 2.5, selection=str(selection), needs={"dwm.init_from": path})
    grid = read(experiment)
    outcome = grid.outcomes[Cell("tiny", "loss", 0)]
    assert (outcome.selecting_s, outcome.needed_s) == (23.0, 10.0)
    assert outcome.wall_s == pytest.approx(23 + 10 + 1.1 * STEPS)
    assert outcome.curve("test").seconds[:2] == pytest.approx([33.0, 34.1])
    found = compare(grid, "tiny", "loss", "uniform")
    assert found is not None  # uniform ends after 10 s, before the other has begun: its first loss is what it has
    assert found.at_wall.interval.mean == pytest.approx(4.1 - 3.1)


def test_selecting_between_stages_counts_from_there_on(experiment: ExperimentConfig) -> None:
    folder = write_cell(experiment, Cell("tiny", "dwm", 0), 2.5)
    for stage, (first, seconds) in enumerate([(0, 1.0), (5, 30.0)]):
        (folder / "stages" / str(stage)).mkdir(parents=True)
        record = {"steps": [first, first + 5], "seconds": seconds}
        (folder / "stages" / str(stage) / "selection.json").write_text(json.dumps(record))
    outcome = read(experiment).outcomes[Cell("tiny", "dwm", 0)]
    seconds = outcome.curve("test").seconds
    assert outcome.selecting_s == 31.0
    assert [seconds[step] for step in (0, 5, 6)] == pytest.approx([1.0, 1 + 5.5, 31 + 6.6])


def test_verdict_win_or_lose(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58, 2: 2.72})
    finish(experiment, "loss", {0: 3.2, 1: 3.31, 2: 3.4})
    finish(experiment, "null-random", {0: 3.01, 1: 3.09, 2: 3.2})
    finish(experiment, "null-shuffled", {0: 3.5, 1: 3.61, 2: 3.7})
    lines = build_board(read(experiment)).verdict
    told = {line.split(":")[0]: line for line in lines}
    assert "better at equal tokens, -0.5000 (-0.5497 to -0.4503)" in told["DWM | learnt against uniform"]
    assert "of its tokens and" in told["DWM | learnt against uniform"]
    assert (
        "worse at equal tokens" in told["loss against uniform"]
        and "its last loss never" in told["loss against uniform"]
    )
    assert "not told apart from uniform" in told["null control random weights"]
    assert "DIFFERS from uniform" in told["null control shuffled weights"]
    assert "better at equal tokens" in told["DWM | learnt against loss"]
    assert "better at equal tokens" in told["DWM | learnt against shuffled weights"]


def test_who_is_declared_against_the_baseline_is_told_once(experiment: ExperimentConfig) -> None:
    methods = dict(experiment.methods)
    methods["dwm"] = dataclasses.replace(methods["dwm"], against=("uniform",))
    experiment = dataclasses.replace(experiment, methods=methods)
    (experiment.folder / EXPERIMENT).write_text(yaml.safe_dump(to_dict(experiment), sort_keys=False))
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58, 2: 2.72})
    board = build_board(read(experiment))
    assert [(pair.method, pair.other) for pair in board.pairs] == [("dwm", "uniform")]
    assert sum(line.startswith("DWM | learnt against uniform") for line in board.verdict) == 1


def test_what_failed_is_named_where_it_is_missing(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58})
    path = record_path(experiment.folder, Cell("tiny", "dwm", 2))
    path.write_text(json.dumps({"state": "failed", "reason": "collapsed"}))
    verdict = build_board(read(experiment)).verdict
    assert any(line.endswith("; WITHOUT what failed: tiny/dwm/seed-2") for line in verdict)


def test_beside_other_runs_wall_clock_decides_nothing(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58, 2: 2.72}, at_once=2, versions={"commit": "a"})
    finish(experiment, "loss", {0: 3.2}, versions={"commit": "b"})
    board = build_board(read(experiment))
    told = next(line for line in board.verdict if line.startswith("DWM | learnt against uniform"))
    assert "better at equal tokens" in told and "beside other runs at equal wall-clock, -0." in told
    assert any("who ran beside whom" in note for note in board.notes)
    assert "Cells ran with different code: a, b." in board.notes


def test_many_comparisons_are_corrected_but_not_the_null_controls(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    for method in ("dwm", "loss", "null-random"):
        finish(experiment, method, {0: 2.9, 1: 3.02, 2: 3.11})
    rows = {row.method: row.versus for row in build_board(read(experiment)).rows}
    alone = rows["null-random"]
    assert alone is not None and alone.p_tokens == alone.at_tokens.p_t
    for method in ("dwm", "loss"):
        versus = rows[method]
        assert versus is not None and versus.p_tokens == pytest.approx(2 * alone.p_tokens)


def test_identical_runs_are_told_from_others(experiment: ExperimentConfig) -> None:
    write_cell(experiment, Cell("tiny", "dwm", 0), 2.5)
    again = write_cell(experiment, Cell("tiny", "dwm", 0, again=True), 2.5)
    assert "two runs of tiny/dwm/seed-0: identical" in build_board(read(experiment)).verdict
    path = again / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["time_s"] *= 2  # of another day: no difference
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "two runs of tiny/dwm/seed-0: identical" in build_board(read(experiment)).verdict
    lines[4]["loss"] += 1e-7
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "two runs of tiny/dwm/seed-0: DIFFERENT, at step 4" in build_board(read(experiment)).verdict


def test_another_set_of_the_same_name_is_not_compared(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", {0: 3.0})
    folder = write_cell(experiment, Cell("tiny", "dwm", 0), 2.5)
    digests = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**digests, "target": "f" * 64}))
    grid = read(experiment)
    row = next(row for row in build_board(grid).rows if row.method == "dwm")
    assert list(row.losses) == ["test"]
    assert row.versus is not None  # by the set that decides
    (folder / "data.json").write_text(json.dumps({**digests, "test": "f" * 64}))
    assert compare(read(experiment), "tiny", "dwm", "uniform") is None


def test_another_budget_is_not_compared(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", {0: 3.0})
    folder = write_cell(experiment, Cell("tiny", "dwm", 0), 2.5)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "tokens": 2 * summary["tokens"]}))
    grid = read(experiment)
    assert compare(grid, "tiny", "dwm", "uniform") is None
    assert "tiny: cells of 2 budgets, of which only the same are compared." in build_board(grid).notes


def test_files_say_the_same_and_hold_every_cell(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    finish(experiment, "dwm", {0: 2.5, 1: 2.58}, at_once=2)
    failed = record_path(experiment.folder, Cell("tiny", "dwm", 2))
    failed.write_text(json.dumps({"state": "failed", "reason": "no space"}))
    write_leaderboard(experiment.folder)
    text = (experiment.folder / "leaderboard.md").read_text()
    lines = text.splitlines()
    # Best first; what has not been run is left out, what has failed is not.
    assert any(line.startswith("| DWM \\| learnt | 2, 1 failed |") for line in lines)
    assert not any(line.startswith("| loss") for line in lines)
    assert lines.index(next(x for x in lines if x.startswith("| DWM \\| learnt"))) < lines.index(
        next(x for x in lines if x.startswith("| uniform (baseline)"))
    )
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1 and f"{STEPS * TOKENS / 1e6:,.2f} M tokens a run" in text
    assert "- tiny/dwm/seed-2: failed: no space." in lines and "- 10 of 16 cells: not begun." in lines
    assert any("ran beside others" in line for line in lines)
    content = json.loads((experiment.folder / "leaderboard.json").read_text())
    assert content["cells"]["tiny/dwm/seed-2"]["state"] == "failed: no space"
    assert content["cells"]["tiny/dwm/seed-0"]["losses"]["test"] == pytest.approx(2.5)
    assert content["configurations"]["tiny/uniform"]["weighting.method"] == "uniform"
    assert str(experiment.folder) not in json.dumps(content)
    page = outline(experiment.folder / "leaderboard.html")
    assert page.fetched == [] and {"Verdict", "Leaderboard", "Experiment x"} <= set(page.headings)
    html = (experiment.folder / "leaderboard.html").read_text()
    # Two sets by two axes, the domains of the only weighted method, and where the time went.
    assert html.count("<svg") == 6 and "DWM | learnt" in html
    assert {"Warnings", "What was preferred, and when", "Fidelity and overhead", "Data card"} <= set(page.headings)


def test_an_overfitted_target_is_a_warning_in_all_files(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", UNIFORM)
    for seed, final in {0: 2.5, 1: 2.58, 2: 2.72}.items():
        folder = write_cell(experiment, Cell("tiny", "dwm", seed), final)
        summary = json.loads((folder / "summary.json").read_text())
        summary["final"]["val/test/loss"] = UNIFORM[seed] + 0.1 + 0.01 * seed
        (folder / "summary.json").write_text(json.dumps(summary))
    write_leaderboard(experiment.folder)
    said = "against the baseline the target loss is 0.5000 nats per token lower, that on test 0.1100 higher"
    content = json.loads((experiment.folder / "leaderboard.json").read_text())
    assert [(one["of"], one["title"], one["found"]) for one in content["warnings"]] == [
        ("DWM | learnt", "Target overfitted", said)
    ]
    assert f"- Target overfitted (DWM | learnt): {said}" in (experiment.folder / "leaderboard.md").read_text()
    assert said[1:] in (experiment.folder / "leaderboard.html").read_text()


def test_one_seed_is_said_to_be_one_seed(experiment: ExperimentConfig) -> None:
    finish(experiment, "uniform", {0: 3.0})
    finish(experiment, "dwm", {0: 2.5})
    board = write_leaderboard(experiment.folder)
    assert any(note.startswith("One seed: there are no intervals") for note in board.notes)
    assert "one seed, no interval at equal tokens, -0.5000;" in board.verdict[0]


def test_nothing_done_yet_is_a_leaderboard_too(experiment: ExperimentConfig) -> None:
    board = write_leaderboard(experiment.folder)
    assert board.verdict == () and "Nothing is done yet." in (experiment.folder / "leaderboard.md").read_text()


def test_a_folder_that_is_no_experiments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no experiment\.yaml"):
        read_grid(tmp_path)
