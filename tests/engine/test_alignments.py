"""What alignments say, against their formula and brute force; of several target sets, and over several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run
from small_llama import STEPS, alignments, cosine, local, moved, target_batch, train_batch
from synthetic import tiny_config
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.evaluate import mean_loss
from ray_dwm.engine.mesh import shard
from ray_dwm.engine.setup import build


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
    found = run(1, tmp_path / "a", alignments, config)
    predicted, realised = found["values"][::2], run(1, tmp_path / "b", brute_force, config)
    assert found["norm"] > 0.3, "the clipping must be active"
    assert cosine(predicted, realised) > 0.9999
    assert float(predicted.norm() / realised.norm()) == pytest.approx(1.0, rel=1e-2)


def brute_force(config: RunConfig) -> torch.Tensor:
    """(L_target(theta'(w + h e_i)) - L_target(theta'(w - h e_i))) / 2h for every second i, by redoing the step."""
    h = 2e-2 / config.train.global_batch
    losses = []
    for index in range(0, config.train.global_batch, 2):
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
