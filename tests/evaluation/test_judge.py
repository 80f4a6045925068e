"""`evaluate` as users meet it: what is printed, kept in the run folder, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from synthetic import tiny_config
from texts import CODE, HILL, SEA, TOKENIZER, shuffled_words, text_shards
from typer.testing import CliRunner

from ray_dwm.cli import app
from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.tokenization import copy_tokenizer
from ray_dwm.errors import DataError, UserError
from ray_dwm.evaluation.scores import (
    Evaluation,
    Score,
    keep,
    read_evaluations,
    read_overlaps,
    table,
    with_error,
)
from ray_dwm.models.lm import build_lm, lm_config

CLEAN = [{"context": f"{name} went out to see the", "last_word": "sea"} for name in ("Anne", "Mary", "Jane")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A finished run's folder, with an LM of random weights, and its shards."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    sets = {"train": [SEA, *shuffled_words(HILL, 4, seed=0)], "target": [HILL], "held_out": [CODE]}
    for name, texts in sets.items():
        text_shards(tmp_path / name, {"prose": texts})
    config = tiny_config({name: tmp_path / name for name in sets}, tmp_path / "runs")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    (config.run_dir / "summary.json").write_text(json.dumps({"steps": 6, "tokens": 2304}))
    hf = config.run_dir / "hf"
    build_lm(lm_config("tiny", vocab_size=8192, seq_len=48), seed=0).save_pretrained(hf)
    copy_tokenizer(TOKENIZER, hf)
    return config


def task_file(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def evaluate(*arguments: object) -> str:
    """Standard output of `ray-dwm evaluate`.

    Raises:
        DwmError: as the command does.
    """
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_scores_are_printed_kept_and_written(run: RunConfig, tmp_path: Path) -> None:
    file = task_file(tmp_path / "clean.jsonl", CLEAN)
    options = ("--tasks", file, "--task-yaml", tmp_path / "yaml", "--output", tmp_path / "out.json")
    printed = evaluate(run.run_dir, tmp_path / "held_out", *options)
    assert "0 of 1 items of the target set (0.00%) share 13 words in a row with the training set" in printed
    assert "0 of 0 items of clean (0.00%) share 13 words in a row with the target set, 3 are too short" in printed
    (kept,) = read_evaluations(run.run_dir)
    assert (kept.step, kept.tokens, [score.metric for score in kept.scores]) == (6, 2304, ["perplexity", "acc"])
    assert all(with_error(score) in printed for score in kept.scores)
    written = json.loads((tmp_path / "out.json").read_text())
    assert (
        written["evaluation"]["scores"]
        == json.loads((run.run_dir / "evaluation.json").read_text())["evaluations"][0]["scores"]
    )
    assert [row["set"] for row in written["perplexity"]] == ["held_out"] and "held_out" in printed
    assert written["overlaps"] == list(map(asdict, read_overlaps(run.run_dir))) and len(written["overlaps"]) == 3
    assert (tmp_path / "yaml" / "clean.yaml").is_file()
    before = (run.run_dir / "evaluation.json").read_bytes()
    evaluate(run.run_dir, "--tasks", file)
    assert (run.run_dir / "evaluation.json").read_bytes() == before


def test_without_sets_and_tasks_the_runs_own_sets_are_looked_at(run: RunConfig, tmp_path: Path) -> None:
    lines = evaluate(run.run_dir).splitlines()
    assert [line.split()[0] for line in lines] == ["set", "target", "held_out"]
    with pytest.raises(UserError, match="is no run folder with sets of its own"):
        copy_tokenizer(TOKENIZER, tmp_path / "bare")
        evaluate(tmp_path / "bare")


def test_a_task_that_was_trained_on_is_refused_and_nothing_is_written(run: RunConfig, tmp_path: Path) -> None:
    items = [{"context": SEA.strip().removesuffix(" storm.") + " the", "last_word": "storm"}, *CLEAN]
    file = task_file(tmp_path / "seen.jsonl", items)
    with pytest.raises(DataError, match=r"1 of 1 items of seen .* with the training set, 3 are too short") as told:
        evaluate(run.run_dir, "--tasks", file, "--output", tmp_path / "out.json")
    assert "--max-overlap = 0.01" in str(told.value) and "\n" not in str(told.value)
    assert not (run.run_dir / "evaluation.json").exists() and not (tmp_path / "out.json").exists()
    assert "1 of 1 items of seen" in evaluate(run.run_dir, "--tasks", file, "--max-overlap", 1)


def test_an_export_knows_what_it_was_trained_on_and_another_lm_does_not(run: RunConfig, tmp_path: Path) -> None:
    file, hf = task_file(tmp_path / "clean.jsonl", CLEAN), run.run_dir / "hf"
    with pytest.raises(UserError, match="pass --no-guard, or name a run folder"):
        evaluate(hf, "--tasks", file)
    unguarded = evaluate(hf, "--tasks", file, "--no-guard")
    assert "13 words" not in unguarded
    (hf / "ray_dwm_config.yaml").write_text(to_yaml(run))
    guarded = evaluate(hf, "--tasks", file)
    assert "with the training set" in guarded and guarded.endswith(unguarded)
    assert not (run.run_dir / "evaluation.json").exists()  # it is not a run folder


def test_a_run_that_has_not_ended_is_told_before_its_data_are_read(run: RunConfig, tmp_path: Path) -> None:
    shutil.rmtree(run.run_dir / "hf")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="neither a finished run folder nor a Hugging Face folder"):
        evaluate(run.run_dir, "--tasks", task_file(tmp_path / "clean.jsonl", CLEAN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "gone.jsonl"), "gone.jsonl cannot be read"),
        (("--tasks", "x.jsonl", "--shots", "many"), "--shots is many: it must be a whole number from 0 to 1000"),
        (("--tasks", "x.jsonl", "--output", "/nowhere/x.json"), "cannot be written: name a file in a folder"),
    ],
)
def test_wrong_options_are_one_line(run: RunConfig, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(run.run_dir, *options)


def score(task: str, shots: int, value: float, error: float | None = 0.1) -> Score:
    return Score(
        task=task,
        metric="acc",
        shots=shots,
        value=value,
        error=error,
        n=4,
        truncated=0,
        higher_is_better=True,
        version="1.0",
    )


def evaluation(step: int | None, *scores: Score) -> Evaluation:
    return Evaluation(
        lm="f" * 64, step=step, tokens=None, batch=32, device="cpu", versions={"lm-eval": "1"}, tasks={}, scores=scores
    )


def test_a_new_score_takes_the_place_of_the_old_one_of_the_same_step(tmp_path: Path) -> None:
    keep(tmp_path, evaluation(6, score("a", 0, 0.1), score("b", 0, 0.2)))
    keep(tmp_path, evaluation(3, score("a", 0, 0.3)))
    keep(tmp_path, evaluation(6, score("a", 0, 0.4), score("a", 2, 0.5)))
    kept = [(each.step, of.task, of.shots, of.value) for each in read_evaluations(tmp_path) for of in each.scores]
    assert kept == [(3, "a", 0, 0.3), (6, "b", 0, 0.2), (6, "a", 0, 0.4), (6, "a", 2, 0.5)]
    (tmp_path / "evaluation.json").write_text('{"evaluations": [{}]}')
    with pytest.raises(DataError, match="is damaged"):
        read_evaluations(tmp_path)


def test_a_metric_without_a_standard_error_says_so() -> None:
    assert with_error(score("a", 0, 0.25, None)) == "0.2500 ± n/a"
    assert table(evaluation(None, score("a", 0, 0.25))).row_count == 1
