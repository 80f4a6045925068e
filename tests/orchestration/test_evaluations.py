"""A run's own evaluations: beside the workers, of checkpoints and of the finished LM, and what befalls them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from safetensors.torch import load_file
from synthetic import tiny_config
from texts import CODE, HILL, SEA, shuffled_words, text_shards

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.engine.export import export_checkpoint
from ray_dwm.engine.messages import MESSAGES
from ray_dwm.engine.probe import checkpoint_path
from ray_dwm.errors import ConfigError, DataError, TrainingError
from ray_dwm.evaluation.harness import Tasks
from ray_dwm.evaluation.scores import Evaluation, Score, read_evaluations, read_overlaps, to_dict
from ray_dwm.orchestration import evaluate
from ray_dwm.orchestration.cluster import needed
from ray_dwm.orchestration.evaluate import Evaluations, check_tasks
from ray_dwm.orchestration.train import train

ITEMS = [{"context": f"{name} went out to see the", "last_word": "sea"} for name in ("Anne", "Mary", "Jane")]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Shards of words, and a task file that has nothing to do with them."""
    for name, rows in {
        "train": [SEA, *shuffled_words(HILL, 31, seed=0)],
        "target": [HILL] * 8,
        "held_out": [CODE],
    }.items():
        text_shards(tmp_path / name, {"prose": rows})
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return {name: tmp_path / name for name in ("train", "target", "held_out")}


def config_of(texts: dict[str, Path], tmp_path: Path, *options: str) -> RunConfig:
    plain = ("weighting.method=uniform", "checkpoint.every=2", "checkpoint.keep=9", "train.micro_batch=4")
    own = (f"evaluation.tasks={tmp_path / 'clean.jsonl'}", "evaluation.every=2")
    return tiny_config(texts, tmp_path / "runs", *plain, *own, *options)


@pytest.mark.slow
def test_a_run_is_evaluated_while_it_trains_and_at_its_end(
    texts: dict[str, Path],
    driver: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(texts, tmp_path, "evaluation.shots=0,1")
    train(config)
    output = capsys.readouterr().out
    kept = {each.step: each for each in read_evaluations(config.run_dir)}
    assert 6 in kept and kept.keys() & {2, 4}
    for step in {2, 4} - kept.keys():
        assert f"step {step} is not evaluated: the evaluation of step" in output
    assert "step 6: clean perplexity (0 shots)" in output and len(kept[6].scores) == 4
    assert kept[6].tokens == 6 * 8 * 48
    assert not list(config.run_dir.glob(".evaluation.*"))
    assert {of.what for of in read_overlaps(config.run_dir)} == {"clean", "the target set"}
    # The last checkpoint's export is the finished LM, and scores of either are those of the other.
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    pool = load_manifest(config.data.train)
    export_checkpoint(config, pool, checkpoint_path(config.run_dir, 6), tmp_path / "lm")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "lm", config.run_dir / "hf"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    again = Tasks(config.evaluation.tasks, tmp_path / "yaml").evaluate(tmp_path / "lm", (0, 1), step=6, tokens=2304)
    assert to_dict(again) == {**to_dict(kept[6]), "scores": to_dict(again)["scores"]}
    assert list(again.scores) == list(kept[6].scores)
    (tmp_path / "damaged").mkdir()
    with pytest.raises(TrainingError, match=r"cannot be read: .metadata is missing"):
        export_checkpoint(config, pool, tmp_path / "damaged", tmp_path / "other")


def evaluation(step: int) -> Evaluation:
    score = Score(
        task="clean",
        metric="acc",
        shots=0,
        value=step / 10,
        error=0.1,
        n=3,
        truncated=0,
        higher_is_better=True,
        version="1.0",
    )
    return Evaluation(lm="0", step=step, tokens=1, batch=1, device="cpu", versions={}, tasks={}, scores=[score])


class FakeRay:
    """In place of Ray: what was asked for ends when it is told to."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ended: dict[int, Any] = {}
        self.options: dict[str, Any] = {}
        self.cancelled: list[int] = []

    def remote(self, max_calls: int) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return SimpleNamespace(remote=self._ask)

        assert max_calls == 1
        return lambda function: SimpleNamespace(options=options)

    def _ask(self, values: Any, checkpoint: str | None, step: int) -> int:
        assert (checkpoint is None) == (step == 6)
        self.asked.append(step)
        return step

    def wait(self, references: list[int], timeout: float | None) -> tuple[list[int], list[int]]:
        if timeout is None:
            self.ended.setdefault(references[0], evaluation(references[0]))
        return ([of for of in references if of in self.ended], [])

    def get(self, reference: int) -> Any:
        if isinstance(self.ended[reference], Exception):
            raise self.ended[reference]
        return to_dict(self.ended[reference])

    def cancel(self, reference: int, force: bool) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setattr(evaluate, "ray", fake)
    yield fake


def checkpoint(config: RunConfig, step: int) -> None:
    folder = checkpoint_path(config.run_dir, step)
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()


def test_the_next_checkpoint_passes_while_one_is_evaluated(
    shards: dict[str, Path], tmp_path: Path, faked: FakeRay, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 1, 3 and 5 are not due, 2 is evaluated, 4 passes, 6 is the end."""
    config = config_of(shards, tmp_path, "checkpoint.every=1")
    for step in (1, 2):
        checkpoint(config, step)
    evaluations = Evaluations(config, [])
    evaluations._look()
    for step in (3, 4, 5, 6):
        checkpoint(config, step)
    evaluations._look()
    assert faked.asked == [2]
    evaluations.finish()
    assert faked.asked == [2, 6] and faked.options["num_cpus"] == 0
    assert faked.options["scheduling_strategy"] == "DEFAULT"  # a sweep's trial would ask its own placement group
    assert [of.step for of in read_evaluations(config.run_dir)] == [2, 6]
    told = (config.run_dir / MESSAGES).read_text()
    assert "step 4 is not evaluated: the evaluation of step 2 still runs" in told
    assert "step 6: clean acc (0 shots) 0.6000 ± 0.1000" in capsys.readouterr().out
    # A resumed run does not do again what is there.
    faked.asked.clear()
    again = Evaluations(config, [])
    again._look()
    assert faked.asked == [4]


def test_an_evaluation_that_dies_is_said_at_once_and_at_the_end(
    shards: dict[str, Path], tmp_path: Path, faked: FakeRay, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards, tmp_path)
    checkpoint(config, 2)
    evaluations = Evaluations(config, [])
    evaluations._look()
    faked.ended[2] = ray.exceptions.WorkerCrashedError()
    evaluations._look()
    assert "the evaluation of step 2 failed: The worker died" in (config.run_dir / MESSAGES).read_text()
    checkpoint(config, 4)
    evaluations._look()
    faked.ended[4] = OSError("no space\nleft")
    evaluations.finish()
    assert faked.asked == [2, 4, 6]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2].partition(" failed")[0] for line in lines[-2:]] == [
        "the evaluation of step 2",
        "the evaluation of step 4",
    ]
    assert lines[-1].endswith("no space")
    assert [of.step for of in read_evaluations(config.run_dir)] == [6]


def test_a_cluster_that_takes_no_evaluation_leaves_the_run_whole(
    shards: dict[str, Path], tmp_path: Path, faked: FakeRay, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards, tmp_path)
    config.run_dir.mkdir(parents=True)
    faked._ask = None  # type: ignore[assignment]
    Evaluations(config, []).finish()
    assert "the finished LM cannot be evaluated: 'NoneType' object is not callable" in capsys.readouterr().out


def test_a_run_that_fails_takes_its_evaluation_with_it(shards: dict[str, Path], tmp_path: Path, faked: FakeRay) -> None:
    config = config_of(shards, tmp_path)
    checkpoint(config, 2)
    (config.run_dir / ".evaluation.killed").mkdir()
    with pytest.raises(TrainingError), Evaluations(config, []) as evaluations:
        evaluations._look()
        raise TrainingError("it diverged")
    assert faked.cancelled == [2] and not evaluations._thread.is_alive()
    assert not (config.run_dir / ".evaluation.killed").exists()


def test_a_run_without_tasks_is_left_alone(shards: dict[str, Path], tmp_path: Path, faked: FakeRay) -> None:
    config = tiny_config(shards, tmp_path)
    assert check_tasks(config) == []
    config.run_dir.mkdir()
    with Evaluations(config, []) as evaluations:
        evaluations.finish()
    assert not faked.asked and not os.listdir(config.run_dir)


def test_tasks_are_looked_at_before_anything_starts(texts: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(texts, tmp_path)
    assert [of.share for of in check_tasks(config)] == [0.0, 0.0, 0.0]
    seen = {"context": SEA.removesuffix(" storm. "), "last_word": "storm"}
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(item) + "\n" for item in (seen, *ITEMS)))
    with pytest.raises(DataError, match=r"1 of 1 items of clean .* more than evaluation.max_overlap = 0.01 allows"):
        check_tasks(config)
    with pytest.raises(DataError, match="task clean has 4 items, too few for 4 shots"):
        check_tasks(config_of(texts, tmp_path, "evaluation.shots=4"))
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("evaluation.every=3",), "evaluation.every is 3: checkpoints are evaluated, so it must be a multiple of"),
        (("evaluation.tasks=",), "evaluation.every needs evaluation.tasks"),
        (("evaluation.shots=0,-1",), r"evaluation.shots is \(0, -1\)"),
        (("evaluation.shots=",), r"evaluation.shots is \(\)"),
        (("evaluation.max_overlap=2",), "evaluation.max_overlap is 2.0"),
        (("evaluation.batch=0",), "evaluation.batch is 0"),
        (("cluster.workers=1,2", "evaluation.cpus=1"), "evaluation.cpus and evaluation.gpus must be 0"),
    ],
)
def test_wrong_settings_are_named(
    shards: dict[str, Path], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(shards, tmp_path, *options)


def test_what_it_takes_is_counted_with_the_runs_own(shards: dict[str, Path], tmp_path: Path) -> None:
    before = needed(config_of(shards, tmp_path), 1)
    after = needed(config_of(shards, tmp_path, "evaluation.cpus=2", "evaluation.gpus=1"), 1)
    assert (after["CPU"] - before["CPU"], after["GPU"] - before["GPU"]) == (2, 1)
