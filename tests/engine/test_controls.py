"""Null controls: as far from uniform as the DWM, and blind to the data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_all
from synthetic import tiny_config
from test_baselines import fitted

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import kl_to_uniform, weights_from_scores
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.controls import applied_weights, generator, learnt_alignments
from ray_dwm.engine.given import build_learner
from ray_dwm.engine.learner import Feedback, LocalWeightService
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build

CONTROLS = ["none", "random", "shuffled", "shuffled_target"]


def test_chance_is_a_pure_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> list[int]:
        return torch.randperm(64, generator=generator(seed, step)).tolist()

    assert draw(0, 3) == draw(0, 3)
    distinct = [draw(seed, step) for seed in (0, 1, 2**63 - 1) for step in (0, 1, 10**6)]
    assert len({tuple(order) for order in distinct}) == len(distinct)


@pytest.mark.parametrize(
    "weights", [torch.full((6,), 1 / 6), torch.eye(6)[2], torch.ones(1), torch.softmax(torch.arange(6.0), 0)]
)
@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_applied_is_as_far_from_uniform(weights: torch.Tensor, control: str) -> None:
    applied = applied_weights(control, weights, seed=1, step=2)
    assert applied.dtype == weights.dtype and float(applied.sum()) == pytest.approx(1.0)
    assert float(kl_to_uniform(applied)) == pytest.approx(float(kl_to_uniform(weights)), abs=1e-4)
    assert torch.equal(applied, weights) or control in ("random", "shuffled")


APPLIED = list(itertools.product(("random", "shuffled"), ((1, 8), (2, 2))))
"""Control, and ranks with a micro-batch."""


@pytest.fixture(scope="module")
def applied(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The run by the row of APPLIED."""
    folder, calls = tmp_path_factory.mktemp("applied"), {}
    for control, (world, micro) in APPLIED:
        options = [f"dwm.control={control}", "dwm.lr=1e-2", "dwm.min_ess_fraction=0", "train.steps=20", "seed=7"]
        options += [f"cluster.workers={world}", f"train.micro_batch={micro}", f"name={control}-{world}"]
        calls[control, (world, micro)] = (world, tiny_config(shards, folder, *options))
    return run_all(folder, fitted, calls)


@pytest.mark.parametrize(("control", "cut"), APPLIED, ids=str)
def test_applied_weights_are_what_training_and_the_records_see(
    applied: dict[Any, Any], control: str, cut: tuple[int, int]
) -> None:
    found = applied[control, cut]
    moved = 0
    for step, (scores, weights, line) in enumerate(
        zip(found["score"], found["weight"] / 8, found["lines"][1:], strict=True)
    ):
        own = weights_from_scores(scores)
        assert float(kl_to_uniform(weights)) == pytest.approx(float(kl_to_uniform(own)), abs=1e-5)
        torch.testing.assert_close(weights, applied_weights(control, own, 7, step), atol=1e-5, rtol=0)
        if control == "shuffled":
            torch.testing.assert_close(weights.sort().values, own.sort().values, atol=1e-6, rtol=0)
        assert line["dwm/ess"] == pytest.approx(float(1 / weights.square().sum()), rel=1e-4)
        moved += float((weights - own).abs().max()) > 1e-3
    assert moved > 10
    assert found["lines"][-1]["dwm/version"] > 5


class Listening(LocalWeightService):
    """Keeps the feedback."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(build_learner(config, check_data(config)))
        self.heard: list[Feedback] = []

    def submit(self, feedback: Feedback) -> None:
        """See WeightService."""
        self.heard.append(feedback)
        super().submit(feedback)


def first_feedback(config: RunConfig) -> torch.Tensor:
    """Alignments of the first bi-level step, at LM step 1."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    service = Listening(config)
    Trainer(build(config, service=service)).fit()
    return service.heard[0].alignments


@pytest.mark.parametrize("world", [1, 2])
def test_a_shuffled_target_permutes_the_feedback(shards: dict[str, Path], tmp_path: Path, world: int) -> None:
    calls = {}
    for control in CONTROLS:
        config = tiny_config(shards, tmp_path / control, f"dwm.control={control}", f"cluster.workers={world}", "seed=3")
        calls[control] = (world, config)
    found = run_all(tmp_path, first_feedback, calls)
    own = found["none"]
    assert torch.equal(found["random"], own) and torch.equal(found["shuffled"], own)
    assert torch.equal(found["shuffled_target"], learnt_alignments("shuffled_target", own, 3, 1))
    assert not torch.equal(found["shuffled_target"], own)
    assert torch.equal(found["shuffled_target"].sort().values, own.sort().values)
