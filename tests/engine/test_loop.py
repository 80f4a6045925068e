"""What stops a run, and what it leaves behind."""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo import run
from synthetic import VOCAB, make_shards, tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import take_share
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.metrics import MetricSink
from ray_dwm.engine.recorder import CollapseGuard
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.engine.setup import build
from ray_dwm.errors import Collapsed, ConfigError, TrainingError
from ray_dwm.models.presets import flops_per_token


def message_of(config: RunConfig) -> str:
    """What a run that must fail says."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with pytest.raises(TrainingError) as raised:
        Trainer(build(config)).fit()
    return str(raised.value)


@pytest.mark.parametrize("world", [1, 2])
def test_a_diverging_run_stops_before_the_optimizer_moves(shards: dict[str, Path], tmp_path: Path, world: int) -> None:
    options = [
        "train.lr=1e30",
        "train.optimizer=sgd",
        "train.clip_norm=0",
        "checkpoint.every=1",
        "weighting.method=uniform",
    ]
    config = tiny_config(shards, tmp_path, *options, f"cluster.workers={world}")
    message = run(world, tmp_path / "p", message_of, config)
    assert "not finite at step" in message and "lower train.lr" in message
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    last = list_checkpoints(config.run_dir / "checkpoints")[-1]
    assert last.name == f"step_{int(lines[-1]['step']):09d}"


def test_collapsed_weights_stop_the_run(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ["dwm.lr=1", "bilevel.kl=0", "bilevel.every=1", "train.steps=60", "dwm.min_ess_fraction=0.6"]
    message = run(1, tmp_path / "p", message_of, tiny_config(shards, tmp_path, *options))
    assert "the weights have collapsed: at step" in message and "raise bilevel.kl" in message


@pytest.mark.parametrize(
    ("fractions", "stops"),
    [
        ([0.01] * 10 + [0.5] + [0.01] * 10, False),
        ([0.05] * 30, False),
        ([0.5] + [0.01] * 11, True),
        ([0.5, float("nan")], True),
    ],
)
def test_weights_have_collapsed_where_they_stay_on_a_few_sequences(fractions: list[float], stops: bool) -> None:
    guard = CollapseGuard(0.05)
    *before, last = enumerate(fractions, start=1)
    for step, fraction in before:
        guard.look(step, fraction)
    with pytest.raises(Collapsed, match=f"at step {len(fractions)} ") if stops else nullcontext():
        guard.look(*last)


def fitted(config: RunConfig) -> list[dict[str, float]]:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    Trainer(build(config)).fit()
    return read_metrics(config.run_dir / "metrics.jsonl")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(["dwm.lm_features=true"], marks=pytest.mark.slow),
        pytest.param(["dwm.lm_features=true", "train.micro_batch=2"], marks=pytest.mark.slow),
    ],
)
def test_the_dwm_finds_what_resembles_the_target(shards: dict[str, Path], tmp_path: Path, extra: list[str]) -> None:
    options = ["train.steps=60", "bilevel.every=2", "dwm.lr=1e-2", "bilevel.kl=0.3"]
    lines = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *options, *extra))
    good, noise = (
        statistics.mean(line[f"weight/{name}"] for line in lines[-40:] if f"weight/{name}" in line)
        for name in ("good", "noise")
    )
    assert good > 1.3 > 0.7 > noise
    assert all(1 <= line["dwm/ess"] <= 8.001 for line in lines[1:])
    assert lines[0]["step"] == 0 and "loss" not in lines[0]


def test_a_shorter_seq_len_cuts_every_sequence(shards: dict[str, Path], tmp_path: Path) -> None:
    lines = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, "lm.seq_len=8"))
    assert lines[-1]["tokens"] == 6 * 8 * 8


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_learning_rates_are_logged(shards: dict[str, Path], tmp_path: Path, schedule: str) -> None:
    config = tiny_config(shards, tmp_path, f"train.schedule={schedule}", "train.decay_fraction=0.4")
    rates = [line["lr"] for line in run(1, tmp_path / "p", fitted, config)[1:]]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])
    assert (rates[-1] < 3e-3) == (schedule != "constant")


@pytest.mark.slow
def test_importing_the_engine_does_not_import_ray() -> None:
    code = (
        "import sys, ray_dwm.engine.setup, ray_dwm.evaluation.perplexity; print(*{'ray', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_of_the_steps_asked_for(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ("train.profile=true", "train.profile_first=2", "train.profile_steps=2")
    config = tiny_config(shards, tmp_path, *options, "train.micro_batch=4", "checkpoint.every=3")
    lines = run(1, tmp_path / "p", fitted, config)
    with gzip.open(config.run_dir / "profile" / "steps-000000002-000000003.json.gz", "rt") as stream:
        names = [event.get("name") for event in json.load(stream)["traceEvents"]]
    assert names.count("step") == 2
    assert "aten::mm" in names
    assert next(line["step"] for line in lines if "checkpoint_seconds" in line) == 4, "saved after 3 and 6 steps"
    for line in lines[1:]:
        flops = line["tokens_per_s"] * flops_per_token("tiny", VOCAB, 16) / 1e12
        assert line["tflops"] == pytest.approx(flops) and "mfu" not in line
        parts = [line[f"step_seconds/{part}"] for part in ("forward", "backward", "optimizer")]
        assert 0 < sum(parts) < line["seconds/step"]
        assert min(parts) > 0


def test_a_trace_of_steps_that_never_come_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.profile_first is 10, but the run has 6 steps"):
        tiny_config(shards, tmp_path, "train.profile=true")


class Closing:
    """A sink that remembers how it was closed, and may fail to."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.exit_codes: list[int] = []

    def log(self, metrics: Any) -> None:
        """See MetricSink."""

    def close(self, exit_code: int) -> None:
        """See MetricSink."""
        self.exit_codes.append(exit_code)
        if self.fails:
            raise OSError("a sink that cannot be closed")


def spoil_nothing(trainer: Trainer, config: RunConfig) -> None:
    """All is well, but for the first sink."""


def spoil_profile(trainer: Trainer, config: RunConfig) -> None:
    """The trace cannot be written."""
    (config.run_dir / "profile").touch()


def spoil_metrics(trainer: Trainer, config: RunConfig) -> None:
    """metrics.jsonl cannot be opened."""
    (config.run_dir / "metrics.jsonl").mkdir()


def ended(config: RunConfig, spoil: Callable[[Trainer, RunConfig], None]) -> tuple[list[list[int]], bool]:
    """How two sinks were closed, and whether the checkpoints' writer was."""
    config.run_dir.mkdir(parents=True)
    sinks = [Closing(fails=True), Closing(fails=False)]
    trainer = Trainer(build(config, sinks=list[MetricSink](sinks)))
    spoil(trainer, config)
    with pytest.raises(OSError):
        trainer.fit()
    return [sink.exit_codes for sink in sinks], trainer._checkpointer._writer._shutdown


@pytest.mark.parametrize(("spoil", "code"), [(spoil_nothing, 0), (spoil_profile, 1), (spoil_metrics, 1)])
def test_where_one_end_fails_the_others_still_come(
    shards: dict[str, Path], tmp_path: Path, spoil: Any, code: int
) -> None:
    options = ("train.profile=true", "train.profile_first=1", "train.profile_steps=5", "weighting.method=uniform")
    config = tiny_config(shards, tmp_path, "train.steps=3", *options)
    assert run(1, tmp_path / "p", ended, config, spoil) == ([[code], [code]], True)


def without_tokens(config: RunConfig) -> str:
    """What a step says."""
    parts = build(config)
    batch = take_share(open_shards(config.data.train), np.arange(8), parts.seq_len, parts.device)
    with pytest.raises(TrainingError) as raised:
        parts.lower.step(0, batch, None)
    return str(raised.value)


def test_a_batch_without_counted_tokens_is_one_line(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("train", "target", "held_out")}
    for folder in folders.values():
        make_shards(folder, good=16, noise=16, masked=True, counted_from=12)
    message = run(1, tmp_path / "p", without_tokens, tiny_config(folders, tmp_path, "lm.seq_len=8"))
    assert message.startswith("no token of a batch counts")
