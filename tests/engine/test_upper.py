"""Schedules in real runs: stages, a held LM, a part of the target set; and what the upper level warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fitted
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.contraction import Problem
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.errors import TrainingError


def test_a_held_lm_only_teaches(shards: dict[str, Path], tmp_path: Path) -> None:
    """Two steps of warm-up, then four held ones: the LM is that of two steps, the DWM has four updates."""
    base = ["train.steps=6", "train.schedule=constant", "bilevel.warmup_steps=2", "dwm.delay_steps=0"]
    staged = ["bilevel.stages=1", "bilevel.stage_updates=4", "bilevel.stage_lm=hold"]
    held = run(1, tmp_path / "h", fitted, tiny_config(shards, tmp_path / "h", *base, *staged))
    short = ["train.steps=2", "train.schedule=constant", "weighting.method=uniform"]
    plain = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path / "p", *short))
    assert held["taken"] == 2
    for a, b in zip(held["theta"], plain["theta"], strict=True):
        assert torch.equal(a, b)
    assert [line.get("dwm/version") for line in held["lines"][1:]] == [0, 0, 0, 1, 2, 3]
    losses = [line["val/target/loss"] for line in held["lines"] if "val/target/loss" in line]
    assert losses[-1] == losses[-2]  # after three steps, and after six


def test_stages_learn_then_stay(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ["train.steps=9", "bilevel.stages=2", "bilevel.stage_updates=2", "dwm.delay_steps=0"]
    found = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *options))
    assert found["taken"] == 9
    assert [line["dwm/version"] for line in found["lines"][1:]] == [0, 0, 1, 2, 2, 2, 3, 4, 4]


def drawn_targets(config: RunConfig) -> list[int]:
    """Sample ids of the target sequences of twenty bi-level steps."""
    parts = build(config)
    assert parts.weigher is not None
    upper = UpperLevel(parts.config, parts.lower, parts.weigher, parts.targets, parts.seq_len, parts.device)
    return sorted({i for update in range(20) for i in upper._draw(update)["target"].sample_ids.tolist()})


def test_a_part_of_the_target_set_is_spread_over_it(shards: dict[str, Path], tmp_path: Path) -> None:
    reader = open_shards(str(shards["target"]))
    ids = reader.sample_ids()
    few = run(1, tmp_path / "f", drawn_targets, tiny_config(shards, tmp_path, "bilevel.target_sequences=10"))
    assert few == sorted(int(ids[7 * k]) for k in range(10))  # of 64 rows, both ends among them
    assert len(run(1, tmp_path / "a", drawn_targets, tiny_config(shards, tmp_path))) > 32


def test_a_poor_estimator_and_concentrated_weights_are_told(
    shards: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    poor = ["bilevel.rank=1", "bilevel.min_fidelity=0.9999", "bilevel.fidelity_every=1"]
    bold = ["dwm.lr=0.1", "dwm.clip_norm=0", "bilevel.kl=0.1", "dwm.min_entropy=0.99", "dwm.min_ess_fraction=0"]
    run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *poor, *bold))
    said = capfd.readouterr().out
    assert "below bilevel.min_fidelity = 0.9999: raise bilevel.rank" in said
    assert said.count("below dwm.min_entropy = 0.99") == 1


class _Broken:
    """An estimator whose arithmetic has gone wrong."""

    needs_theta, watch_seconds = False, 0.0

    def watch(self, rows_c: torch.Tensor, direction: Any) -> None:
        """See Estimator."""

    def stop(self) -> None:
        """See Estimator."""

    def contract(self, problem: Problem) -> torch.Tensor:
        """See Estimator."""
        return torch.full_like(problem.losses_c, float("nan"))


def broken(config: RunConfig) -> str:
    """What a run with a broken estimator says."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(build(config))
    assert trainer._upper is not None
    trainer._upper._step._estimator = _Broken()
    with pytest.raises(TrainingError) as raised:
        trainer.fit()
    return str(raised.value)


def test_alignments_that_are_not_finite_stop_the_run_before_a_checkpoint(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config(shards, tmp_path, "checkpoint.every=4", "bilevel.warmup_steps=3")
    message = run(1, tmp_path / "p", broken, config)
    assert message.startswith("the alignments of step 3 are not finite (bilevel.estimator=ghost_lowrank)")
    assert not list((config.run_dir / "checkpoints").glob("step_*"))
