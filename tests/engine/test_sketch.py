"""ghost_lowrank against autograd: its exact parts apart from its sketch, at ranks far below the LM's width."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run, run_all
from small_llama import alignments, cosine, train_batch
from synthetic import tiny_config
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaForCausalLM

from ray_dwm.config import RunConfig
from ray_dwm.core.losses import sample_losses, token_losses
from ray_dwm.engine.contraction import Problem, whole
from ray_dwm.engine.mesh import all_gather_rows, init_mesh, shard
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.setup import build
from ray_dwm.engine.sketch import GhostLowRank
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.weighting import GivenWeights
from ray_dwm.models.lm import build_lm, lm_config

RANK = 5


def sketched(config: RunConfig, tied: bool, recompute: bool, fraction: float) -> tuple[Tensor, Tensor, float]:
    """(ghost_lowrank, what it should be, share of the head's u that is outside of the sketch) for a random u.

    What it should be comes from an LM without FSDP whose embedding and head are two matrices: u itself for the
    embedding, P P^T u Q Q^T for Linears, nothing for the norms; and u less its projection for the labels' logits.
    """
    shape = lm_config("tiny", vocab_size=64, seq_len=16)
    shape.tie_word_embeddings = tied
    mesh = init_mesh(config.parallel.shard)
    model = build_lm(shape, seed=0, loss_chunk=config.parallel.loss_chunk)
    model = parallelize(model, mesh, config.train.precision, config.parallel)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lower, parts = LowerLevel(model, mesh, config.train), build(config)
    for step in range(3):
        lower.step(step, train_batch(parts, step), None)
        lower.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    theta = [p.full_tensor().detach().clone() for p in lower.parameters]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(7)
    u = [torch.randn(x.shape, generator=generator) for x in theta]
    local = [shard(distribute_tensor(x, p.device_mesh, p.placements)) for x, p in zip(u, lower.parameters, strict=True)]
    batch = train_batch(parts, 3)
    rows = torch.arange(0, len(batch), round(1 / fraction))
    before, estimator = lower.snapshot(), GhostLowRank(lower, RANK)
    estimator.watch(rows, None)
    spaces = {names[i]: space for i, space in estimator._spaces.items()}
    weights = torch.softmax(torch.randn(8, generator=generator), dim=0)
    result = lower.step(3, batch, GivenWeights(weights))
    estimator.stop()
    scale = torch.distributed.get_world_size() * weights[torch.distributed.get_rank() * len(batch) + rows]
    problem = Problem(before, local, batch.rows(rows), result.losses_b[rows], scale, result.tokens_per_sample)
    found = estimator.contract(problem)

    direction = dict(zip(names, u, strict=True))
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    projected = {n: s.left @ (s.left.T @ direction[n] @ s.right) @ s.right.T for n, s in spaces.items()}
    twin_shape = lm_config("tiny", vocab_size=64, seq_len=16)
    twin_shape.tie_word_embeddings = False
    twin = LlamaForCausalLM(twin_shape)
    start = dict(zip(names, theta, strict=True)) | {"lm_head.weight": dict(zip(names, theta, strict=True))[head]}
    moves = {n: torch.zeros_like(x) for n, x in start.items()} | projected
    moves["lm_head.weight"] = projected[head]
    moves["model.embed_tokens.weight"] = direction["model.embed_tokens.weight"]
    missed = direction[head] - projected[head]
    chosen = problem.batch

    def losses(step: Tensor) -> Tensor:
        moved = {n: x + step * moves[n] for n, x in start.items()}
        output = torch.func.functional_call(
            twin, moved, (), {"input_ids": chosen.input_ids, "output_hidden_states": True}
        )
        h = output.hidden_states[-1].detach()
        picked = torch.einsum("btd,btd->bt", h[:, :-1], missed[chosen.input_ids[:, 1:]]) * chosen.mask
        labels = -step * picked.sum(dim=1) / problem.tokens
        return sample_losses(token_losses(output.logits, chosen.input_ids), chosen.mask, problem.tokens) + labels

    expected = torch.autograd.functional.jacobian(losses, torch.zeros(()))
    share = float(missed.norm() / direction[head].norm())
    return all_gather_rows(found), all_gather_rows(expected), share


SKETCHES = [(1, 8, False, 1.0), (1, 2, True, 0.5), (2, 4, False, 0.5), (2, 1, True, 1.0)]
"""Ranks, micro-batch, whether activations are computed again, part of the batch."""


@pytest.fixture(scope="module")
def sketches(masked_shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """`sketched` by the row of SKETCHES and whether the embeddings are tied."""
    folder, calls = tmp_path_factory.mktemp("sketches"), {}
    for case, tied in itertools.product(SKETCHES, (True, False)):
        world, micro, recompute, fraction = case
        config = tiny_config(masked_shards, folder, f"cluster.workers={world}", f"train.micro_batch={micro}")
        calls[case, tied] = (world, config, tied, recompute, fraction)
    return run_all(folder, sketched, calls)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", SKETCHES, ids=str)
def test_only_what_it_says_is_approximated(sketches: dict[Any, Any], case: tuple[Any, ...], tied: bool) -> None:
    found, expected, missed = sketches[case, tied]
    assert missed > 0.5, "most of the head's u must be outside of the sketch"
    assert len(found) == round(8 * case[-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def spans(config: RunConfig) -> list[float]:
    """For every sketched matrix, how much of the momentum its subspace holds over how much the best one would."""
    parts = build(config)
    for step in range(3):
        parts.lower.step(step, train_batch(parts, step), None)
        parts.lower.zero_grad()
    estimator = GhostLowRank(parts.lower, RANK)
    estimator.watch(torch.arange(4), None)
    held = []
    for index, space in estimator._spaces.items():
        parameter = parts.lower.parameters[index]
        momentum = whole(parameter, shard(parts.lower.optimizer.state[parameter]["exp_avg"]))
        best = torch.linalg.svdvals(momentum)[:RANK].norm()
        held.append(float((space.left.T @ momentum @ space.right).norm() / best))
        for basis in (space.left, space.right):
            torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), rtol=0, atol=1e-5)
    return held


@pytest.mark.parametrize("world", [1, 2])
def test_the_subspaces_are_the_momentums_leading_ones(
    masked_shards: dict[str, Path], tmp_path: Path, world: int
) -> None:
    config = tiny_config(masked_shards, tmp_path, f"cluster.workers={world}", "train.micro_batch=4")
    held = run(world, tmp_path / "p", spans, config)
    assert len(held) == 15 and min(held) > 0.9  # random ones would hold a tenth


@pytest.mark.parametrize(("rank", "bar"), [(8, 0.95), (16, 0.99)])
def test_fidelity_at_ranks_below_the_width(
    masked_shards: dict[str, Path], tmp_path: Path, rank: int, bar: float
) -> None:
    exact = run(1, tmp_path / "e", alignments, tiny_config(masked_shards, tmp_path, "bilevel.estimator=exact"))
    sketch = run(1, tmp_path / "s", alignments, tiny_config(masked_shards, tmp_path, f"bilevel.rank={rank}"))
    assert cosine(sketch["values"], exact["values"]) >= bar
