"""A budget in real runs: how often the upper level is visited, by the clock."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fitted
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.core.schedules import EveryN
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.budget import Budget
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import shard
from ray_dwm.engine.setup import build


def spending(config: RunConfig) -> list[Any]:
    """What a budget says to made-up seconds.

    A plain step takes 1 s, weighing 0.01 s, a bi-level step 0.06 s and 0.01 s for each target sequence, and in the
    second step after it an actor is waited for, for 0.04 s.
    """
    schedule = EveryN(every=5, warmup_steps=2, delay_steps=1, changing=True)
    budget, choices, last = Budget(config, schedule), [], -9
    for step in range(500):
        slow = 1.5 if choices else 1.0  # the upper level becomes slower after the first choice
        parts, seconds = None, {"data": 0.3, "dwm_wait": 0.0, "weigh": 0.01, "step": 0.6, "bilevel": 0.0, "log": 0.1}
        if step == last + 2:
            seconds["dwm_wait"] = slow * 0.04
        if schedule.is_bilevel(step):
            target = slow * 0.01 * budget.target_batch
            parts = {"target_gradient": target, "direction": 0.0, "fidelity": 0.0}
            seconds["bilevel"], last = target + slow * 0.06, step
        choice = budget.observe(step, seconds, parts)
        if choice is not None:
            choices.append((step, choice.every, choice.target_batch))
    other = Budget(config, EveryN(every=5, warmup_steps=2, delay_steps=1, changing=True))
    other.load_state_dict(budget.state_dict())
    same = [schedule.updates_before(s) for s in range(450, 600)]
    again = [other._schedule.updates_before(s) for s in range(450, 600)]
    return [choices, same == again, other.target_batch]


def test_a_budget_chooses_watches_and_chooses_again(shards: dict[str, Path], tmp_path: Path) -> None:
    """Room is 0.04 s a step. 0.26 / 0.04 gives 7: halved, 0.18 / 0.04 gives 5. Then 0.27 / 0.04: every 7th."""
    config = tiny_config(shards, tmp_path, "bilevel.every=0", "bilevel.target_batch=16", "bilevel.fidelity_every=0")
    choices, same, batch = run(1, tmp_path / "p", spending, config)
    assert choices[0] == (12, 5, 8)  # the third bi-level step, after those at 2 and 7
    assert [choice[1:] for choice in choices[1:]] == [(7, 8)]
    assert same and batch == 8


MADE_UP = {"data": 0.0, "dwm_wait": 0.0, "weigh": 0.0, "step": 1.0, "bilevel": 0.18, "log": 0.0}


def budgeted(config: RunConfig, stop_at: int) -> list[Any]:
    """Bi-level steps and final LM of a run whose clock says what it is told; stopped and resumed if `stop_at`."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for ends in ([stop_at] if stop_at else []) + [config.train.steps]:
        trainer = Trainer(build(config))
        assert trainer._upper is not None and trainer._upper._budget is not None
        observe, step_of = trainer._upper._budget.observe, trainer._train_step

        def told(step: int, seconds: Any, parts: Any, observe: Any = observe) -> Any:
            del seconds
            return observe(step, MADE_UP, parts and {"target_gradient": 0.08, "fidelity": 0.0})

        def ending(step: int, *batches: Any, ends: int = ends, step_of: Any = step_of) -> Any:
            if step == ends:
                raise KeyboardInterrupt
            return step_of(step, *batches)

        trainer._upper._budget.observe = told  # type: ignore[method-assign]
        trainer._train_step = ending  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    steps = [line["step"] for line in lines if "bilevel_seconds/contraction" in line]
    return [steps, [shard(p).detach().clone() for p in trainer._lower.parameters]]


@pytest.mark.slow
def test_a_budget_run_resumes_with_its_choice(shards: dict[str, Path], tmp_path: Path) -> None:
    """0.18 s a visit and 5 % of 1 s: every 4th step, chosen at the third visit."""
    options = ["bilevel.every=0", "train.steps=40", "checkpoint.every=6", "bilevel.fidelity_every=0"]
    whole = run(1, tmp_path / "a", budgeted, tiny_config(shards, tmp_path / "a", *options), 0)
    again = run(1, tmp_path / "b", budgeted, tiny_config(shards, tmp_path / "b", *options), 33)
    assert whole[0] == [2, 7, 12, 16, 20, 24, 28, 32, 36, 40]  # counted from 1
    assert again[0] == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(whole[1], again[1], strict=True))


def test_a_run_within_a_budget(shards: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["bilevel.every=0", "bilevel.max_overhead=0.5", "train.steps=34", "checkpoint.every=34"]
    found = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *options))
    chosen = [line for line in found["lines"] if "bilevel/every" in line]
    assert len(chosen) >= 1 and chosen[0]["step"] == 12
    assert f"a bi-level step every {chosen[0]['bilevel/every']:g} steps" in capfd.readouterr().out
