"""The whole bi-level step on a small Llama: estimators against each other and against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run
from synthetic import tiny_config
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import standardise, upper_objective, weights_from_scores, whole_batch
from ray_dwm.data.plan import target_rows
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import Batch, take_share
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.checks import check_data, read_plan
from ray_dwm.engine.contraction import Oracle, Problem
from ray_dwm.engine.evaluate import mean_loss
from ray_dwm.engine.ghost import Ghost
from ray_dwm.engine.mesh import all_gather_rows, init_mesh, shard
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.weighting import GivenWeights
from ray_dwm.models.dwm import build_dwm, dwm_shape
from ray_dwm.models.lm import build_lm, lm_config

STEPS, TARGETS = 4, 8


def local(parts: Parts, folder: str, rows: np.ndarray) -> Batch:
    return take_share(open_shards(folder), rows, 16, parts.device)


def train_batch(parts: Parts, step: int) -> Batch:
    """This rank's share of a training batch."""
    plan = read_plan(parts.config, check_data(parts.config))
    return local(parts, parts.config.data.train, plan.rows(step))


def target_batch(parts: Parts) -> Batch:
    """This rank's share of the target batch."""
    folder = parts.config.data.target
    return local(parts, folder, target_rows(open_shards(folder).manifest.rows, TARGETS, 0, 0))


def alignments(config: RunConfig) -> dict[str, Any]:
    """Alignments of step STEPS over the global batch, their phi-gradient, and whether theta' was left as it was."""
    parts = build(config)
    bilevel = BilevelStep(parts.lower, config.bilevel)
    for step in range(STEPS):
        parts.lower.step(step, train_batch(parts, step), None)
        parts.lower.zero_grad()
    batch = train_batch(parts, STEPS)
    bilevel.begin(STEPS, 0, batch, {"target": target_batch(parts)})
    result = parts.lower.step(STEPS, batch, None)
    after = [shard(p).clone() for p in parts.lower.parameters]
    outcome = bilevel.finish(batch, result)
    values = outcome.alignments_C
    restored = all(torch.equal(a, shard(p)) for a, p in zip(after, parts.lower.parameters, strict=True))
    phi = phi_gradient(all_gather_rows(batch.input_ids)[:8], values, outcome.positions_C)
    figures = outcome.figures
    return {"values": values, "restored": restored, "norm": result.grad_norm, "phi": phi, "figures": figures}


def phi_gradient(ids: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """dJ/dphi, flat, of a DWM whose score head is not zero."""
    model = build_dwm(dwm_shape("xs", 64), seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    standard, _ = standardise(values, 0.0, 0.9)
    standard = whole_batch(standard, positions, len(ids))
    upper_objective(weights_from_scores(model(ids)), standard, 0.1).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine after centring."""
    a, b = a.double(), b.double()
    return float(torch.nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


BARS = {"jvp": 1 - 1e-6, "central": 0.9999, "one_sided": 0.9995, "ghost_lowrank": 0.99}


@pytest.mark.parametrize(
    "options",
    [
        ["train.optimizer=adamw"],
        ["train.optimizer=adamw", "train.clip_norm=0.3"],
        ["train.optimizer=sgd", "train.momentum=0.9", "train.clip_norm=0"],
        ["train.optimizer=sgd", "train.momentum=0.9", "train.clip_norm=0.3"],
        ["train.optimizer=adamw", "bilevel.target_at=theta"],
        ["train.optimizer=adamw", "bilevel.fraction=0.5"],
    ],
)
def test_estimators_agree_with_exact(shards: dict[str, Path], tmp_path: Path, options: list[str]) -> None:
    options = [*options, "train.schedule=constant"]
    got = {
        name: run(1, tmp_path / name, alignments, tiny_config(shards, tmp_path, *options, f"bilevel.estimator={name}"))
        for name in ("exact", *BARS)
    }
    exact = got.pop("exact")
    assert ("train.clip_norm=0.3" in options) <= (exact["norm"] > 0.3), "the clipping must be active"
    for name, result in got.items():
        assert cosine(result["values"], exact["values"]) >= BARS[name], name
        assert cosine(result["phi"], exact["phi"]) >= BARS[name], name
        assert result["restored"]
        if "bilevel.target_at=theta" in options:  # the judge stays at theta'
            assert result["figures"]["dwm/fidelity"] < 0.9999
        else:  # what the run says of its own error is true
            true = cosine(result["values"], exact["values"])
            assert result["figures"]["dwm/fidelity"] == pytest.approx(true, abs=2e-3)


@pytest.mark.parametrize("estimator", ["central", "ghost_lowrank"])
def test_estimators_in_bf16_agree_with_exact_in_fp32(shards: dict[str, Path], tmp_path: Path, estimator: str) -> None:
    exact = run(1, tmp_path / "e", alignments, tiny_config(shards, tmp_path, "bilevel.estimator=exact"))
    options = ["train.precision=bf16", f"bilevel.estimator={estimator}"]
    other = run(1, tmp_path / "c", alignments, tiny_config(shards, tmp_path, *options))
    assert cosine(other["values"], exact["values"]) >= 0.99


def same_direction(config: RunConfig, tied: bool, recompute: bool, fraction: float) -> tuple[Tensor, Tensor]:
    """(ghost, exact) for one random u that reaches every parameter, over the contracted sequences of all ranks."""
    shape = lm_config("tiny", vocab_size=64, seq_len=16)
    shape.tie_word_embeddings = tied
    mesh = init_mesh(config.parallel.shard)
    model = build_lm(shape, seed=0, loss_chunk=config.parallel.loss_chunk)
    model = parallelize(model, mesh, config.train.precision, config.parallel)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lower = LowerLevel(model, mesh, config.train)
    generator = torch.Generator().manual_seed(7)
    parts = build(config)  # for its data
    whole_u = [torch.randn(p.shape, generator=generator) for p in lower.parameters]
    u = [
        shard(distribute_tensor(x, p.device_mesh, p.placements)) for x, p in zip(whole_u, lower.parameters, strict=True)
    ]
    batch = train_batch(parts, 0)
    rows = torch.arange(1 if fraction < 1 else 0, len(batch), round(1 / fraction))
    theta, ghost = lower.snapshot(), Ghost(lower)
    ghost.watch(rows, u)
    result = lower.step(0, batch, moved(8, 3, 0.05))
    start = torch.distributed.get_rank() * len(batch)
    scale = torch.distributed.get_world_size() * result.weights_B[start + rows]
    problem = Problem(theta, u, batch.rows(rows), result.losses_b[rows], scale, result.tokens_per_sample)
    found = ghost.contract(problem)
    return all_gather_rows(found), all_gather_rows(Oracle(lower, "exact").contract(problem))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("world", "micro", "recompute", "fraction", "precision"),
    [
        (1, 8, False, 1.0, "fp32"),
        (1, 2, True, 1.0, "fp32"),
        (1, 4, False, 0.5, "fp32"),
        (1, 8, False, 1.0, "bf16"),
        (2, 4, True, 0.5, "fp32"),
        (2, 1, False, 1.0, "fp32"),
    ],
)
def test_ghost_equals_exact_for_the_same_direction(
    masked_shards: dict[str, Path],
    tmp_path: Path,
    tied: bool,
    world: int,
    micro: int,
    recompute: bool,
    fraction: float,
    precision: str,
) -> None:
    """Linear, Embedding and RMSNorm; weighted, masked, accumulated, recomputed, sharded."""
    options = [f"cluster.workers={world}", f"train.micro_batch={micro}", f"train.precision={precision}"]
    config = tiny_config(masked_shards, tmp_path, *options)
    ghost, exact = run(world, tmp_path / "p", same_direction, config, tied, recompute, fraction)
    assert len(ghost) == round(8 * fraction)
    assert cosine(ghost, exact) >= (0.9999 if precision == "fp32" else 0.999)
    assert float((ghost - exact).norm() / exact.norm()) <= (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [("exact", 1e-5), ("jvp", 1e-5), ("ghost", 1e-5), ("ghost_lowrank", 1e-5), ("central", 2e-3), ("one_sided", 4e-3)],
)
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
    """AdamW with active clipping. Finite differences subtract two fp32 losses, which costs them digits."""
    data = masked_shards if mask else shards
    options = [f"bilevel.estimator={estimator}", "train.clip_norm=0.3"]
    options += ["bilevel.target_at=theta"] if estimator == "ghost" else []
    fraction = 1.0 if (world, micro) == (2, 1) else 0.5
    options.append(f"bilevel.fraction={fraction}")
    one = run(1, tmp_path / "1", alignments, tiny_config(data, tmp_path, *options))
    many = [f"cluster.workers={world}", f"train.micro_batch={micro}"]
    other = run(world, tmp_path / "2", alignments, tiny_config(data, tmp_path, *options, *many))
    for key in ("values", "phi"):
        scale = float(one[key].abs().max())
        torch.testing.assert_close(other[key] / scale, one[key] / scale, rtol=0, atol=tolerance)
    assert one["restored"] and other["restored"]


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("exact", ["train.optimizer=sgd", "train.lr=0.3", "train.clip_norm=0"]),
        ("ghost", ["train.optimizer=sgd", "train.lr=0.3", "train.clip_norm=0"]),
        ("ghost", ["train.clip_norm=0.3"]),
        ("ghost", ["train.clip_norm=0.3", "bilevel.preconditioner=none"]),
        ("exact", ["train.clip_norm=0", "bilevel.preconditioner=none"]),
    ],
)
def test_before_the_step_the_target_gradient_is_that_of_theta(
    shards: dict[str, Path], tmp_path: Path, estimator: str, options: list[str]
) -> None:
    """a_i = -lr k <gain * grad L_target(theta), grad l_i(theta)>, by a loop of single backward passes."""
    options = [*options, "bilevel.target_at=theta", f"bilevel.estimator={estimator}", "train.schedule=constant"]
    config = tiny_config(shards, tmp_path, *options)
    found = run(1, tmp_path / estimator, alignments, config)
    assert config.train.clip_norm == 0 or found["norm"] > config.train.clip_norm, "the clipping must be active"
    expected = run(1, tmp_path / "p", plain_alignments, config, found["norm"])
    torch.testing.assert_close(found["values"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def plain_alignments(config: RunConfig, norm: float) -> Tensor:
    """The formula of ghost with AdamW written out; with plain SGD, or alignments as if it were, it is exact."""
    parts, c = build(config), config.train
    lower = parts.lower
    for step in range(STEPS):
        lower.step(step, train_batch(parts, step), None)
        lower.zero_grad()

    def gradient(batch: Batch) -> Tensor:
        losses = []
        for row in range(len(batch)):
            one = batch.rows(torch.tensor([row]))
            losses.append(lower.model(one.input_ids).losses_bT.sum())
        (torch.stack(losses).sum() / (15 * len(batch))).backward()
        grads = torch.cat([shard(p.grad).flatten() for p in lower.parameters])
        lower.zero_grad()
        return grads

    gain = torch.ones(())
    if c.optimizer == "adamw" and config.bilevel.preconditioner == "optimizer":
        square = torch.cat([shard(lower.optimizer.state[p]["exp_avg_sq"]).flatten() for p in lower.parameters])
        root = (square / (1 - c.beta2**STEPS)).sqrt()
        gain = torch.where(root > 0, (1 - c.beta1) / (1 - c.beta1 ** (STEPS + 1)) / (root + c.eps), 0.0)
    k = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
    u, batch = k * gain * gradient(target_batch(parts)), train_batch(parts, STEPS)
    dots = [torch.dot(u, gradient(batch.rows(torch.tensor([i])))) for i in range(len(batch))]
    return -c.lr * torch.stack(dots)


def two_targets(config: RunConfig) -> dict[str, Any]:
    """Alignments of each set alone and of both, and what is logged of each."""
    found: dict[str, Any] = {}
    for name, sets in (("target", ["target"]), ("other", ["other"]), ("both", ["target", "other"])):
        parts = build(config)
        for step in range(STEPS):
            parts.lower.step(step, train_batch(parts, step), None)
            parts.lower.zero_grad()
        batch = train_batch(parts, STEPS)
        batches = {"target": target_batch(parts), "other": local(parts, config.data.held_out["test"], np.arange(4))}
        bilevel = BilevelStep(parts.lower, config.bilevel)
        bilevel.begin(STEPS, 0, batch, {s: batches[s] for s in sets})
        outcome = bilevel.finish(batch, parts.lower.step(STEPS, batch, None))
        found[name] = outcome.alignments_C
        found["figures"] = outcome.figures
    return found


def test_target_sets_are_combined_by_weight_and_logged_apart(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(
        shards,
        tmp_path,
        f"data.more_targets.other={shards['target']}",
        "bilevel.estimator=exact",
        "bilevel.target_weights.target=3",
        "train.clip_norm=0",
    )
    found = run(1, tmp_path / "p", two_targets, config)
    expected = 0.75 * found["target"] + 0.25 * found["other"]
    torch.testing.assert_close(found["both"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for name in ("target", "other"):  # uniform weights: sum_i w_i a_i is the mean
        logged = found["figures"][f"bilevel/alignment/{name}"]
        assert logged == pytest.approx(float(found[name].mean()), rel=1e-4)


def over_updates(config: RunConfig) -> list[tuple[bool, float]]:
    """Of five bi-level steps in a row: whether the target gradient was made anew, and the fidelity."""
    parts = build(config)
    bilevel = BilevelStep(parts.lower, config.bilevel)
    parts.lower.step(0, train_batch(parts, 0), None)
    parts.lower.zero_grad()
    found = []
    for step in range(1, 6):
        batch = train_batch(parts, step)
        bilevel.begin(step, step - 1, batch, {"target": target_batch(parts)})
        outcome = bilevel.finish(batch, parts.lower.step(step, batch, None))
        parts.lower.zero_grad()
        found.append((bilevel.seconds["target_gradient"] > 0, outcome.figures["dwm/fidelity"]))
    return found


@pytest.mark.parametrize(
    ("options", "fresh"),
    [
        ([], [True] * 5),
        (["bilevel.reuse=3"], [True, False, False, True, False]),
        (["bilevel.reuse=3", "bilevel.max_staleness=1"], [True, False, True, True, False]),
    ],
)
def test_a_reused_target_gradient_is_renewed_in_time_and_costs_fidelity(
    shards: dict[str, Path], tmp_path: Path, options: list[str], fresh: list[bool]
) -> None:
    config = tiny_config(
        shards, tmp_path, "bilevel.estimator=exact", "bilevel.fidelity_every=1", "train.lr=0.03", *options
    )
    found = run(1, tmp_path / "p", over_updates, config)
    assert [f for f, _ in found] == fresh
    assert all((fidelity > 0.9995) == is_fresh for is_fresh, fidelity in found), found


@pytest.mark.parametrize("at", ["theta", "theta_prime"])
def test_other_weights_do_what_the_alignments_predict(shards: dict[str, Path], tmp_path: Path, at: str) -> None:
    options = ["train.lr=1e-3", f"bilevel.target_at={at}", "bilevel.estimator=exact", "train.clip_norm=0.3"]
    found = run(1, tmp_path / "p", alignments, tiny_config(shards, tmp_path, *options))
    figures = found["figures"]
    assert found["restored"] and figures["bilevel/realised_change"] < 0
    assert figures["bilevel/predicted_change"] == pytest.approx(figures["bilevel/realised_change"], rel=0.1)


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
                weigher = moved(config.train.global_batch, index, sign * h if step == STEPS else 0.0)
                parts.lower.step(step, train_batch(parts, step), weigher)
                parts.lower.zero_grad()
            pair.append(mean_loss(parts.lower.model, [target_batch(parts)]))
        losses.append((pair[0] - pair[1]) / (2 * h))
    return torch.tensor(losses)


def moved(size: int, index: int, h: float) -> GivenWeights:
    """Uniform weights with one moved by h."""
    weights = torch.full((size,), 1.0 / size)
    weights[index] += h
    return GivenWeights(weights)
