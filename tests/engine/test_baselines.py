"""Online baselines in real runs: their weights against plain transformers forwards, and what must not change them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from gloo import run, run_all
from synthetic import make_shards, tiny_config
from transformers import LlamaForCausalLM

from ray_dwm.config import RunConfig
from ray_dwm.core.losses import token_losses
from ray_dwm.core.reweighting import anchor_alignment, annealed_r, joint_update_aware_weights, loss_based_weights
from ray_dwm.data.plan import target_rows
from ray_dwm.data.records import read_metrics
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import Batch, take_share, to_batch
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.export import export_dwm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build

LOSS = ["weighting.method=loss"]
JOINT = ["weighting.method=joint_update_aware", "weighting.anchor_every=2", "weighting.anchor_sequences=16"]


def fitted(config: RunConfig) -> dict[str, Any]:
    """Metrics and columns of weights/*.parquet as (steps, B) tensors."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build(config)
    Trainer(parts).fit()
    export_dwm(parts, check_data(config), config.train.steps)
    columns: dict[str, torch.Tensor] = {}
    if (config.run_dir / "weights").exists():
        table = pq.read_table(config.run_dir / "weights")
        for name in ("sample_id", "loss", "score", "weight"):
            columns[name] = torch.tensor(table[name].to_pylist()).view(-1, config.train.global_batch)
    return {"lines": read_metrics(config.run_dir / "metrics.jsonl"), **columns}


@pytest.mark.parametrize(
    "options",
    [
        ["weighting.strategy=linupper"],
        ["weighting.strategy=quadratic", "weighting.r=0.1"],
        ["weighting.strategy=extremes", "train.micro_batch=2"],
        ["weighting.r_warmup_steps=2"],
        ["weighting.r_warmup_steps=1", "weighting.r_anneal_steps=4", "weighting.r=0.2"],
    ],
)
def test_loss_weights_follow_from_the_logged_losses(
    shards: dict[str, Path], tmp_path: Path, options: list[str]
) -> None:
    config = tiny_config(shards, tmp_path, *LOSS, *options)
    found, c = run(1, tmp_path / "p", fitted, config), config.weighting
    for step in range(config.train.steps):
        r = annealed_r(step, warmup_steps=c.r_warmup_steps, r_final=c.r, anneal_steps=c.r_anneal_steps)
        expected = 8 * loss_based_weights(found["loss"][step], c.strategy, r)
        torch.testing.assert_close(found["weight"][step], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["score"][step], expected.log(), atol=1e-5, rtol=0)
    uniform = [bool((row == 1).all()) for row in found["weight"]]
    assert sum(uniform) == (c.r_warmup_steps + (1 if c.r_anneal_steps else 0))


def twin_of(parts: Parts) -> LlamaForCausalLM:
    """The LM as it is now, without FSDP."""
    twin = LlamaForCausalLM(parts.lower.model.config)
    with torch.no_grad():
        for copy, p in zip(twin.parameters(), parts.lower.model.parameters(), strict=True):
            copy.copy_(p.full_tensor())  # type: ignore[attr-defined]
    return twin


def plain_losses(twin: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean loss over the counted tokens of each sequence."""
    losses = token_losses(twin(input_ids=batch.input_ids).logits, batch.input_ids)
    return torch.stack([x[m].mean() for x, m in zip(losses, batch.mask, strict=True)])


def plain_embeddings(twin: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    return twin(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[-1][:, -1]


@torch.no_grad()
def weights_and_plain_ones(config: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (weights of a step, their recomputation from a plain forward of the same LM)."""
    parts, c, pairs = build(config), config.weighting, []
    target, anchor = open_shards(config.data.target), torch.zeros(0)
    for step, rows in enumerate(parts.source.stream(0, 5)):
        twin, batch = twin_of(parts), to_batch(rows, 8, parts.seq_len, parts.device)
        if c.method == "loss":
            expected = loss_based_weights(plain_losses(twin, batch), c.strategy, c.r)
        else:
            if step % c.anchor_every == 0:
                drawn = target_rows(target.manifest.rows, c.anchor_sequences, step // c.anchor_every, config.seed)
                anchor = plain_embeddings(twin, take_share(target, drawn, parts.seq_len, parts.device)).mean(0)
            expected = joint_update_aware_weights(
                *anchor_alignment(plain_embeddings(twin, batch), anchor), c.beta, c.tau
            )
        assert parts.weighting is not None
        parts.weighting.advance(step)
        with torch.enable_grad():
            result = parts.lower.step(step, batch, parts.weighting)
        assert not result.weights_B.requires_grad
        pairs.append((result.weights_B, expected))
        parts.lower.zero_grad()
    return pairs


@pytest.mark.parametrize("method", [LOSS, JOINT, [*JOINT, "weighting.beta=2", "weighting.tau=0.2"]])
@pytest.mark.parametrize("extra", [[], ["train.micro_batch=2"], ["lm.seq_len=12"]])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_equal_those_of_a_plain_forward(
    shards: dict[str, Path], tmp_path: Path, method: list[str], extra: list[str], masked: bool
) -> None:
    if masked:
        shards = {**shards, "train": tmp_path / "masked"}
        make_shards(shards["train"], good=40, noise=40, seed=5, masked=True)
    pairs = run(1, tmp_path / "p", weights_and_plain_ones, tiny_config(shards, tmp_path, *method, *extra))
    for weights, expected in pairs:
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
        assert float((8 * expected - 1).abs().max()) > 0.05


METHODS = {"loss": LOSS, "joint": JOINT}
CUTS = [(1,), (3,), (1, "train.micro_batch=3"), (2, "train.micro_batch=2")]
"""Ranks and overrides; the first is not cut."""


@pytest.fixture(scope="module")
def cut(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The run by method and row of CUTS."""
    folder, calls = tmp_path_factory.mktemp("cuts"), {}
    for method, (world, *changes) in itertools.product(METHODS, CUTS):
        name = f"name={method}-{world}-{len(changes)}"
        base = ["train.optimizer=sgd", "train.lr=0.1"]  # Adam amplifies rounding of small gradients
        options = [*METHODS[method], *base, *changes, name, f"cluster.workers={world}"]
        calls[method, (world, *changes)] = (world, tiny_config(shards, folder, *options))
    return run_all(folder, fitted, calls)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CUTS[1:], ids=str)
def test_world_and_accumulation_do_not_change_the_weights(
    cut: dict[Any, Any], method: str, case: tuple[Any, ...]
) -> None:
    reference, other = cut[method, CUTS[0]], cut[method, case]
    assert torch.equal(reference["sample_id"], other["sample_id"])
    torch.testing.assert_close(reference["weight"] / 8, other["weight"] / 8, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["uniform", "loss", "joint_update_aware", "dwm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_trains_and_logs_what_it_has(
    shards: dict[str, Path], tmp_path: Path, method: str, precision: str
) -> None:
    options = [f"weighting.method={method}", "weighting.anchor_sequences=16", f"train.precision={precision}"]
    config = tiny_config(shards, tmp_path, *options, "train.steps=30")
    found = run(1, tmp_path / "p", fitted, config)
    lines = found["lines"]
    assert lines[-1]["val/target/loss"] < lines[0]["val/target/loss"] - 0.2
    keys = set(lines[-1])
    weighted = {"dwm/ess", "dwm/entropy", "dwm/overhead_frac", "weight/noise"}
    learnt = {"dwm/version", "dwm/hypergrad_norm", "dwm/kl"}
    assert keys & weighted == (set() if method == "uniform" else weighted)
    assert keys & learnt == (learnt if method == "dwm" else set())
    assert (config.run_dir / "weights").exists() == (method != "uniform")
    assert (config.run_dir / "dwm").exists() == (method == "dwm")
    if method != "uniform":
        torch.testing.assert_close(found["weight"].sum(1), torch.full((30,), 8.0))
        ess = [line["dwm/ess"] for line in lines[1:]]
        assert ess == pytest.approx((64 / found["weight"].square().sum(1)).tolist(), rel=1e-4)


def test_the_loss_baseline_needs_no_target_set(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, *LOSS)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, target=""))
    assert len(run(1, tmp_path / "p", fitted, config)["lines"]) == 7


def test_the_collapse_guard_is_the_dwms(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ["weighting.tau=0.002", "dwm.min_ess_fraction=0.9"]
    found = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *JOINT, *options))
    assert min(line["dwm/ess"] for line in found["lines"][1:]) < 5
