"""Sets of finished runs are compared before a report, once; and a report says where nobody has looked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import tiny_config
from synthetic_experiment import UNIFORM, finish
from synthetic_runs import fill
from texts import HILL, SEA, shuffled_words, text_shards

from ray_dwm.analysis import overlaps
from ray_dwm.analysis.overlaps import look, unchecked
from ray_dwm.analysis.publish import write_leaderboard
from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import Run, open_run, open_runs
from ray_dwm.config.experiment import ExperimentConfig
from ray_dwm.evaluation.contamination import Overlap, set_pairs
from ray_dwm.evaluation.scores import keep, read_overlaps


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two runs of the same sets: SEA stands in all of them, HILL in the held-out set alone."""
    sets = {"train": [SEA, *shuffled_words(HILL, 8, seed=0)], "target": [SEA], "held_out": [SEA, HILL]}
    for name, rows in sets.items():
        text_shards(tmp_path / name, {"prose": rows})
    folders = {name: tmp_path / name for name in sets}
    own = ("weighting.method=uniform", "train.steps=10")
    return [open_run(fill(tiny_config(folders, tmp_path / "runs", f"name={name}", *own), 3.0)) for name in "ab"]


def found(run: Run) -> dict[tuple[str, str], tuple[int, int]]:
    return {(of.what, of.against): (of.overlapping, of.judged) for of in read_overlaps(run.folder)}


def test_sets_are_compared_without_tasks_and_those_of_several_runs_once(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared, compare = [], overlaps.compare_sets
    monkeypatch.setattr(overlaps, "compare_sets", lambda *given: compared.append(given) or compare(*given))
    look(runs)
    assert len(compared) == 1 and capsys.readouterr().out == ""
    for run in runs:
        assert found(run) == {
            ("the target set", "the training set"): (1, 1),
            ("held-out set test", "the training set"): (1, 2),
            ("held-out set test", "the target set"): (1, 2),
        }
    look(runs)
    assert len(compared) == 1 and unchecked(runs) == []


def too_large(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(overlaps, "MOST_TOKENS", 12 * 48 - 1)


def without_tokenizer(run: Run, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(Path(run.config.data.target) / "tokenizer")


def gone(run: Run, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run.config.data.train)


def other_shards(run: Run, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run.config.data.train)
    text_shards(Path(run.config.data.train), {"prose": [HILL]})


def unwritable(run: Run, patch: pytest.MonkeyPatch) -> None:
    (run.folder / "evaluation.json").mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (too_large, "its sets have 576 tokens, more than 575"),
        (without_tokenizer, "has no tokenizer beside its shards"),
        (gone, "holds no manifest.json"),
        (other_shards, "the shards of train are not those that it was made with"),
        (unwritable, "Is a directory"),
    ],
)
def test_what_cannot_be_looked_at_is_said_and_nothing_fails(
    runs: list[Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Run, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    spoil(runs[0], monkeypatch)
    look(runs[:1])
    said = capsys.readouterr().out
    assert said.startswith("contamination is not looked for in 1 of 1 runs, as in ") and reason in said
    assert unchecked(runs[:1]) == ["contamination"]


def test_as_much_as_the_limit_is_looked_at(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "MOST_TOKENS", 12 * 48)  # 9, 1 and 2 rows
    look(runs)
    assert unchecked(runs) == []


def test_one_run_that_was_not_looked_at_is_said_so(runs: list[Run], tmp_path: Path) -> None:
    look(runs[:1])
    assert unchecked(runs) == ["contamination in 1 of 2 runs"]
    write_report([run.folder for run in runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Not looked for: contamination in 1 of 2 runs." in page and "no contamination" not in page
    (partly,) = [of for of in read_overlaps(runs[0].folder) if of.what == "the target set"]
    keep(runs[1].folder, None, [partly])  # as tasks' guard leaves it, which looks at no held-out set
    assert unchecked(open_runs([run.folder for run in runs])) == ["contamination in 1 of 2 runs"]


def test_a_leaderboard_says_it_of_any_cell(experiment: ExperimentConfig) -> None:
    assert unchecked([]) == ["contamination"]
    finish(experiment, "uniform", UNIFORM)
    for seed, said in ((0, "contamination in 2 of 3 runs"), (1, "contamination in 1 of 3 runs"), (2, "")):
        run = open_run(experiment.folder / f"tiny/uniform/seed-{seed}")
        own = {"items": 1, "judged": 1, "overlapping": 0, "words": 13, "of": ""}
        pairs = sorted(set_pairs(run.config.data))
        keep(run.folder, None, [Overlap(what=what, against=against, **own) for what, against in pairs])
        write_leaderboard(experiment.folder)
        for name in ("leaderboard.md", "leaderboard.html"):
            text = (experiment.folder / name).read_text()
            assert f"Not looked for: {said}." in text if said else "Not looked for" not in text
