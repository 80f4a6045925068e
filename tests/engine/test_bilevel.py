"""The whole bi-level step on a small Llama: estimators against each other and against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run
from synthetic import make_shards, tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import standardise, upper_objective, weights_from_scores
from ray_dwm.data.plan import target_rows
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import Batch, to_batch
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.evaluate import mean_loss
from ray_dwm.engine.loop import Parts
from ray_dwm.engine.mesh import all_gather_rows, shard
from ray_dwm.engine.setup import build, check_data, read_plan
from ray_dwm.errors import TrainingError
from ray_dwm.models.dwm import build_dwm, dwm_shape

STEPS, TARGETS = 4, 8


@pytest.fixture(scope="session")
def masked_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of which a random third of the tokens count."""
    root = tmp_path_factory.mktemp("masked")
    for seed, name in enumerate(("train", "target", "held_out"), start=1):
        make_shards(root / name, good=32, noise=32, seed=seed, masked=True)
    return {name: root / name for name in ("train", "target", "held_out")}


def local(parts: Parts, folder: str, rows: np.ndarray) -> Batch:
    return to_batch(open_shards(folder).take(rows), 16, parts.device)


def train_batch(parts: Parts, step: int) -> Batch:
    """This rank's share of a training batch."""
    plan = read_plan(parts.config, check_data(parts.config))
    rows = plan.rows(step, torch.distributed.get_rank(), torch.distributed.get_world_size())
    return local(parts, parts.config.data.train, rows)


def target_batch(parts: Parts) -> Batch:
    """This rank's share of the target batch."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder = parts.config.data.target
    rows = target_rows(open_shards(folder).manifest.rows, TARGETS, 0, 0)
    share = TARGETS // world
    return local(parts, folder, rows[rank * share : (rank + 1) * share])


def alignments(config: RunConfig) -> dict[str, Any]:
    """Alignments of step STEPS over the global batch, their phi-gradient, and whether theta' was left as it was."""
    parts = build(config)
    bilevel = BilevelStep(parts.lower, config.bilevel)
    for step in range(STEPS):
        parts.lower.step(step, train_batch(parts, step), None)
        parts.lower.zero_grad()
    theta = bilevel.snapshot()
    batch = train_batch(parts, STEPS)
    result = parts.lower.step(STEPS, batch, None)
    after = [shard(p).clone() for p in parts.lower.parameters]
    values = all_gather_rows(bilevel.alignments(theta, batch, result, target_batch(parts)))
    restored = all(torch.equal(a, shard(p)) for a, p in zip(after, parts.lower.parameters, strict=True))
    phi = phi_gradient(all_gather_rows(batch.input_ids), values)
    return {"values": values, "restored": restored, "norm": result.grad_norm, "phi": phi}


def phi_gradient(ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """dJ/dphi, flat, of a DWM whose score head is not zero."""
    model = build_dwm(dwm_shape("xs", 64), seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    standard, _ = standardise(values, 0.0, 0.9)
    upper_objective(weights_from_scores(model(ids)), standard, 0.1).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine after centring."""
    return float(torch.nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_central_and_jvp_agree_with_exact(shards: dict[str, Path], tmp_path: Path, optimizer: str, clip: float) -> None:
    options = [f"train.optimizer={optimizer}", f"train.clip_norm={clip}", "train.schedule=constant"]
    got = {
        name: run(1, tmp_path / name, alignments, tiny_config(shards, tmp_path, *options, f"bilevel.estimator={name}"))
        for name in ("exact", "jvp", "central")
    }
    exact = got["exact"]["values"]
    torch.testing.assert_close(got["jvp"]["values"], exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    assert cosine(got["central"]["values"], exact) >= 0.9999
    assert clip == 0.0 or got["exact"]["norm"] > clip, "the clipping must be active"
    assert all(g["restored"] for g in got.values())


def test_central_in_bf16_agrees_with_exact_in_fp32(shards: dict[str, Path], tmp_path: Path) -> None:
    exact = run(1, tmp_path / "e", alignments, tiny_config(shards, tmp_path, "bilevel.estimator=exact"))
    central = run(1, tmp_path / "c", alignments, tiny_config(shards, tmp_path, "train.precision=bf16"))
    assert cosine(central["values"], exact["values"]) >= 0.99


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (2, 1)])
@pytest.mark.parametrize(("estimator", "tolerance"), [("exact", 1e-5), ("jvp", 1e-5), ("central", 2e-3)])
@pytest.mark.parametrize("mask", [False, True])
def test_ranks_and_accumulation_do_not_change_the_phi_gradient(
    shards: dict[str, Path],
    masked_shards: dict[str, Path],
    tmp_path: Path,
    world: int,
    micro: int,
    estimator: str,
    tolerance: float,
    mask: bool,
) -> None:
    """AdamW with active clipping. `central` subtracts two fp32 losses, which costs it digits."""
    data = masked_shards if mask else shards
    options = [f"bilevel.estimator={estimator}", "train.clip_norm=0.3"]
    one = run(1, tmp_path / "1", alignments, tiny_config(data, tmp_path, *options))
    many = [f"cluster.workers={world}", f"train.micro_batch={micro}"]
    other = run(world, tmp_path / "2", alignments, tiny_config(data, tmp_path, *options, *many))
    for key in ("values", "phi"):
        scale = float(one[key].abs().max())
        torch.testing.assert_close(other[key] / scale, one[key] / scale, rtol=0, atol=tolerance)
    assert one["restored"] and other["restored"]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "optimizer", [["adamw"], ["sgd", "train.lr=0.3"], ["sgd", "train.lr=0.1", "train.momentum=0.9"]]
)
def test_alignments_predict_the_realised_change(
    shards: dict[str, Path], masked_shards: dict[str, Path], tmp_path: Path, optimizer: list[str], mask: bool
) -> None:
    """dL_target/dw_i against a finite difference in the weight itself: the definition, by brute force."""
    name, *extra = optimizer
    options = [f"train.optimizer={name}", *extra, "train.clip_norm=0.3", "train.schedule=constant"]
    config = tiny_config(masked_shards if mask else shards, tmp_path, "bilevel.estimator=exact", *options)
    predicted = run(1, tmp_path / "a", alignments, config)
    realised = run(1, tmp_path / "b", brute_force, config)
    assert predicted["norm"] > 0.3, "the clipping must be active"
    assert cosine(predicted["values"], realised) > 0.9999
    assert float(predicted["values"].norm() / realised.norm()) == pytest.approx(1.0, rel=1e-2)


def brute_force(config: RunConfig) -> torch.Tensor:
    """(L_target(theta'(w + h e_i)) - L_target(theta'(w - h e_i))) / 2h by redoing the step."""
    h = 2e-2 / config.train.global_batch
    losses = []
    for index in range(config.train.global_batch):
        pair = []
        for sign in (1, -1):
            parts = build(config)
            for step in range(STEPS + 1):
                weigher = _Fixed(config.train.global_batch, index, sign * h if step == STEPS else 0.0)
                parts.lower.step(step, train_batch(parts, step), weigher)  # type: ignore[arg-type]
                parts.lower.zero_grad()
            pair.append(mean_loss(parts.lower.model, [target_batch(parts)]))
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


def without_tokens(config: RunConfig) -> str:
    """What a step says."""
    parts = build(config)
    batch = to_batch(open_shards(config.data.train).take(np.arange(8)), parts.seq_len, parts.device)
    with pytest.raises(TrainingError) as raised:
        parts.lower.step(0, batch, None)
    return str(raised.value)


def test_a_batch_without_counted_tokens_is_one_line(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("train", "target", "held_out")}
    for folder in folders.values():
        make_shards(folder, good=16, noise=16, masked=True, counted_from=12)
    message = run(1, tmp_path / "p", without_tokens, tiny_config(folders, tmp_path, "lm.seq_len=8"))
    assert message.startswith("no token of a batch counts")
