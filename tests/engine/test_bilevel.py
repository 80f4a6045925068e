"""The whole bi-level step on a small Llama: estimators against each other and against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.plan import target_rows
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import to_batch
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.mesh import all_gather_rows, shard
from ray_dwm.engine.setup import build, check_data, read_plan

STEPS = 4


def alignments(config: RunConfig) -> dict[str, Any]:
    """Alignments of step STEPS, over the global batch, and whether theta' was left as it was."""
    parts = build(config)
    bilevel = BilevelStep(parts.lower, config.bilevel)
    plan = read_plan(config, check_data(config))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def batch(step: int) -> Any:
        return to_batch(open_shards(config.data.train).take(plan.rows(step, rank, world)), 16, parts.device)

    for step in range(STEPS):
        parts.lower.step(step, batch(step), None)
        parts.lower.zero_grad()
    theta = bilevel.snapshot()
    result = parts.lower.step(STEPS, batch(STEPS), None)
    after = [shard(p).clone() for p in parts.lower.parameters]
    reader = open_shards(config.data.target)
    rows = target_rows(reader.manifest.rows, 8, 0, 0)
    share = 8 // world
    target = to_batch(reader.take(rows[rank * share : (rank + 1) * share]), 16, parts.device)
    values = all_gather_rows(bilevel.alignments(theta, batch(STEPS), result, target))
    restored = all(torch.equal(a, shard(p)) for a, p in zip(after, parts.lower.parameters, strict=True))
    return {"values": values, "restored": restored, "norm": result.grad_norm}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine after centring."""
    return float(torch.nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_central_and_jvp_agree_with_exact(shards: dict[str, Path], tmp_path: Path, optimizer: str, clip: float) -> None:
    options = [f"train.optimizer={optimizer}", f"train.clip_norm={clip}", "train.schedule=constant"]
    got = {
        name: run(
            1,
            tmp_path / name,
            alignments,
            tiny_config(shards, tmp_path, *options, f"bilevel.estimator={name}"),
        )
        for name in ("exact", "jvp", "central")
    }
    exact = got["exact"]["values"]
    torch.testing.assert_close(got["jvp"]["values"], exact, rtol=2e-4, atol=1e-3 * float(exact.abs().max()))
    assert cosine(got["central"]["values"], exact) >= 0.9999
    assert clip == 0.0 or got["exact"]["norm"] > clip, "the clipping must be active"
    assert all(g["restored"] for g in got.values())


@pytest.mark.parametrize("estimator", ["central", "exact", "jvp"])
def test_two_ranks_and_accumulation_equal_one(shards: dict[str, Path], tmp_path: Path, estimator: str) -> None:
    options = [f"bilevel.estimator={estimator}", "train.optimizer=sgd", "train.lr=0.5", "bilevel.epsilon=0.3"]
    one = run(1, tmp_path / "1", alignments, tiny_config(shards, tmp_path, *options))
    two = run(2, tmp_path / "2", alignments, tiny_config(shards, tmp_path, *options, "train.micro_batch=2"))
    scale = float(one["values"].abs().max())
    tolerance = 1e-5 if estimator != "central" else 1e-3  # central subtracts two losses in fp32
    torch.testing.assert_close(two["values"] / scale, one["values"] / scale, rtol=0, atol=tolerance)


def test_alignments_predict_the_realised_change(shards: dict[str, Path], tmp_path: Path) -> None:
    """dL_target/dw_i against a finite difference in the weight itself: the definition, by brute force."""
    config = tiny_config(shards, tmp_path, "bilevel.estimator=exact", "train.schedule=constant")
    predicted = run(1, tmp_path / "a", alignments, config)["values"]
    realised = run(1, tmp_path / "b", brute_force, config)
    assert cosine(predicted, realised) > 0.999
    assert float(predicted.norm() / realised.norm()) == pytest.approx(1.0, rel=0.02)


def brute_force(config: RunConfig) -> torch.Tensor:
    """(L_target(theta'(w + h e_i)) - L_target(theta'(w - h e_i))) / 2h by redoing the step."""
    from ray_dwm.engine.evaluate import mean_loss

    plan = read_plan(config, check_data(config))
    reader = open_shards(config.data.target)
    losses = []
    h = 2e-2 / config.train.global_batch
    for index in range(config.train.global_batch):
        pair = []
        for sign in (1, -1):
            parts = build(config)
            target = to_batch(reader.take(target_rows(reader.manifest.rows, 8, 0, 0)), 16, parts.device)
            for step in range(STEPS + 1):
                rows = open_shards(config.data.train).take(plan.rows(step))
                batch = to_batch(rows, 16, parts.device)
                weigher = _Fixed(config.train.global_batch, index, sign * h if step == STEPS else 0.0)
                parts.lower.step(step, batch, weigher)  # type: ignore[arg-type]
                parts.lower.zero_grad()
            pair.append(mean_loss(parts.lower.model, target, 8))
        losses.append((pair[0] - pair[1]) / (2 * h))
    return torch.tensor(losses)


class _Fixed:
    """Uniform weights with one moved by h."""

    uses_statistics = False

    def __init__(self, size: int, index: int, h: float) -> None:
        self._weights = torch.full((size,), 1.0 / size)
        self._weights[index] += h

    def weigh(self, ids: torch.Tensor, statistics: None) -> tuple[torch.Tensor, torch.Tensor]:
        """The fixed weights."""
        return self._weights, self._weights
