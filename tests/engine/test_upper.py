"""Schedules in real runs: stages, a held LM, a DWM that is given, and a budget."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.core.schedules import EveryN
from ray_dwm.core.weighting import weights_from_scores
from ray_dwm.data.records import read_metrics
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.budget import Budget
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.contraction import Problem
from ray_dwm.engine.export import export_dwm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import shard
from ray_dwm.engine.setup import build
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.errors import DataError, TrainingError
from ray_dwm.models.folders import load_dwm


def fitted(config: RunConfig) -> dict[str, Any]:
    """Metrics, final LM, and the optimizer's step count."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    manifest = check_data(config)
    parts = build(config, on_version=lambda step: export_dwm(parts, manifest, step))
    Trainer(parts).fit()
    state = parts.lower.optimizer.state[parts.lower.parameters[0]]
    theta = [shard(p).detach().clone() for p in parts.lower.parameters]
    return {"lines": read_metrics(config.run_dir / "metrics.jsonl"), "theta": theta, "taken": int(state["step"])}


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


@pytest.fixture(scope="module")
def taught(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has learnt a DWM and left its trajectory."""
    root = tmp_path_factory.mktemp("taught")
    options = ["train.steps=8", "bilevel.every=1", "dwm.trajectory_points=4", "dwm.lr=0.03", "name=taught"]
    config = tiny_config(shards, root, *options)
    run(1, root / "p", fitted, config)
    return config


def applied(config: RunConfig) -> torch.Tensor:
    """Weights that training used, (steps, B)."""
    table = pq.read_table(config.run_dir / "weights")
    return torch.tensor(table["weight"].to_pylist()).view(-1, config.train.global_batch)


def expected_weights(config: RunConfig, folder: Path, step: int) -> torch.Tensor:
    """Of a plain forward of a DWM folder over the batch of a step, (B,)."""
    model, _ = load_dwm(folder)
    ids = pq.read_table(config.run_dir / "weights")["sample_id"].to_pylist()[step * 8 : (step + 1) * 8]
    reader = open_shards(config.data.train)
    rows = reader.take(np.arange(reader.manifest.rows))
    where = {int(key): row for row, key in enumerate(rows.sample_ids)}
    tokens = torch.from_numpy(rows.input_ids[[where[i] for i in ids]].astype("int64"))
    return 8 * weights_from_scores(model(tokens).detach())


def test_a_frozen_dwm_weighs_without_learning(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = sorted((taught.run_dir / "dwm").glob("v*"))[-1]
    config = tiny_config(shards, tmp_path, "dwm.mode=frozen", f"dwm.init_from={folder}")
    found = run(1, tmp_path / "p", fitted, config)
    weights = applied(config)
    for step in (0, 5):
        expected = expected_weights(config, folder, step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)
        assert float(expected.std()) > 1e-3
    assert not any("dwm/hypergrad_norm" in line for line in found["lines"])
    assert not (config.run_dir / "dwm").exists()


def test_a_trajectory_is_replayed_by_fraction_of_training(
    shards: dict[str, Path], tmp_path: Path, taught: RunConfig
) -> None:
    """Recorded after 2, 4, 6 and 8 of 8 steps, each first applied at the step before; replayed over 16."""
    trajectory = taught.run_dir / "dwm"
    entries = json.loads((trajectory / "trajectory.json").read_text())["versions"]
    assert [entry["fraction"] for entry in entries] == [0.0, 0.375, 0.625, 0.875]
    config = tiny_config(shards, tmp_path, "train.steps=16", "dwm.mode=replay", f"dwm.trajectory={trajectory}")
    found = run(1, tmp_path / "p", fitted, config)
    assert [line["dwm/version"] for line in found["lines"][1:]] == [1] * 6 + [2] * 4 + [3] * 4 + [4] * 2
    weights = applied(config)
    assert torch.equal(weights[3], torch.ones(8))
    for step, entry in ((6, entries[1]), (15, entries[3])):
        expected = expected_weights(config, trajectory / entry["folder"], step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)


def exported_at_the_end(config: RunConfig) -> None:
    """As a worker ends: what a kill after the last checkpoint has prevented is done again."""
    parts = build(config)
    Trainer(parts).fit()
    export_dwm(parts, check_data(config), config.train.steps)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("options", [["bilevel.every=1"], ["bilevel.every=3", "dwm.delay_steps=2"]])
def test_a_trajectory_holds_what_weighed_the_step_of_each_point(
    shards: dict[str, Path], tmp_path: Path, options: list[str], ahead: bool
) -> None:
    base = ["train.steps=8", "dwm.trajectory_points=4", "dwm.lr=0.03", f"dwm.look_ahead={ahead}", *options]
    config = tiny_config(shards, tmp_path, *base)
    used = [int(line["dwm/version"]) for line in run(1, tmp_path / "p", fitted, config)["lines"][1:]]
    folder, weights = config.run_dir / "dwm", applied(config)
    entries = json.loads((folder / "trajectory.json").read_text())["versions"]
    points = sorted({used[step] for step in (1, 3, 5, 7)})
    assert [(e["folder"], e["fraction"] * 8) for e in entries] == [(f"v{v:06d}", used.index(v)) for v in points]
    for entry in entries:
        step = round(entry["fraction"] * 8)
        expected = expected_weights(config, folder / entry["folder"], step)
        torch.testing.assert_close(weights[step], expected, rtol=1e-4, atol=1e-4)
    newest = folder / entries[-1]["folder"]
    before = {file.name: file.read_bytes() for file in newest.iterdir()}
    shutil.rmtree(newest)
    run(1, tmp_path / "q", exported_at_the_end, config)
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == before
    assert json.loads((folder / "trajectory.json").read_text())["versions"] == entries


def test_learning_goes_on_from_a_given_dwm(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = sorted((taught.run_dir / "dwm").glob("v*"))[-1]
    given = ["dwm.mode=adapt", f"dwm.init_from={folder}"]
    config = tiny_config(shards, tmp_path, *given, "bilevel.every=1", "checkpoint.every=6")
    found = run(1, tmp_path / "p", fitted, config)
    torch.testing.assert_close(applied(config)[0], expected_weights(config, folder, 0), rtol=1e-4, atol=1e-4)
    assert found["lines"][-1]["dwm/version"] > 0
    adapted = json.loads((sorted((config.run_dir / "dwm").glob("v*"))[-1] / "config.json").read_text())
    assert adapted["learnt_on"] == {"lm": "tiny", "step": adapted["learnt_on"]["step"], "run": "run", "steps": 6}
    before = json.loads((folder / "config.json").read_text())
    assert adapted["started_from"] == {
        "version": before["version"],
        "learnt_on": before["learnt_on"],
        "started_from": None,
    }
    assert before["learnt_on"]["run"] == "taught"


def test_the_replays_overhead_is_the_forward_alone(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    given = ["dwm.mode=replay", f"dwm.trajectory={taught.run_dir / 'dwm'}"]
    lines = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *given))["lines"][1:]
    assert [line["seconds/bilevel"] for line in lines] == [0] * 6
    assert min(line["seconds/weigh"] for line in lines) > 0


def test_a_dwm_of_other_features_is_refused(shards: dict[str, Path], tmp_path: Path, taught: RunConfig) -> None:
    folder = tmp_path / "dwm"
    shutil.copytree(sorted((taught.run_dir / "dwm").glob("v*"))[-1], folder)
    content = json.loads((folder / "config.json").read_text())
    assert content["features"] == ["token_ids"]
    (folder / "config.json").write_text(json.dumps({**content, "features": ["token_ids", "grammar"]}))
    with pytest.raises(DataError, match=r"looks at \['token_ids', 'grammar'\], this version"):
        check_data(tiny_config(shards, tmp_path, "dwm.mode=frozen", f"dwm.init_from={folder}"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["dwm.mode=replay", "dwm.trajectory={dwm}/v000001"], "trajectory.json does not exist"),
        (["dwm.mode=frozen", "dwm.init_from={dwm}"], "not a readable DWM folder"),
        (["dwm.init_from={dwm}/none"], "not a readable DWM folder"),
    ],
)
def test_what_cannot_be_read_is_named(
    shards: dict[str, Path], tmp_path: Path, taught: RunConfig, options: list[str], reason: str
) -> None:
    config = tiny_config(shards, tmp_path, *[o.format(dwm=taught.run_dir / "dwm") for o in options])
    with pytest.raises(DataError, match=reason):
        run(1, tmp_path / "p", build, config)


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
