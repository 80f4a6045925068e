"""A restart keeps its run in W&B, and the progress line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from synthetic import tiny_config

from ray_dwm.engine.messages import MESSAGES, say
from ray_dwm.orchestration.progress import Progress
from ray_dwm.orchestration.tracking import sinks


def test_auto_is_offline_without_a_key_and_a_restart_keeps_the_run(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = tiny_config(shards, tmp_path, "tracking.wandb=auto")
    config.run_dir.mkdir()
    for _ in range(2):
        (sink,) = sinks(config)
        sink.log({"step": 1, "tokens": 128, "loss": 3.0})
        sink.close(0)
    files = list((config.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.stem for file in files}) == 1


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, "[run] step 3/6  loss 2.500  100 tokens/s  ETA 0:06"),
        ({"dwm/ess": 4.0, "dwm/version": 1}, "[run] step 3/6  loss 2.500  100 tokens/s  ETA 0:06  ESS 50%  DWM v1"),
    ],
)
def test_plain_line_where_there_is_no_terminal(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, float], expected: str
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    config = tiny_config(shards, tmp_path)
    config.run_dir.mkdir()
    with Progress(config):
        line = {"step": 3, "tokens": 600, "loss": 2.5, "tokens_per_s": 100.0, **extra}
        (config.run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert out.getvalue().splitlines() == ["[run] starting 1 workers", expected]


def test_what_workers_say_is_passed_on_once(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    config = tiny_config(shards, tmp_path)
    config.run_dir.mkdir()
    say(config.run_dir, "of an attempt before")
    with Progress(config), (config.run_dir / MESSAGES).open("a") as stream:
        stream.write("[run] warning: one\n[run] two\n[run] not who")
    told = out.getvalue().splitlines()
    assert told == ["[run] of an attempt before", "[run] starting 1 workers", "[run] warning: one", "[run] two"]


def test_a_look_that_fails_is_not_the_last(
    shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(shards, tmp_path)
    (config.run_dir / MESSAGES).mkdir(parents=True)
    progress = Progress(config)
    progress._told = 0  # of a folder the system says a size
    progress._show([])
    (config.run_dir / MESSAGES).rmdir()
    say(config.run_dir, "two")
    capsys.readouterr()
    progress._show([])
    assert capsys.readouterr().out == "[run] two\n"
