"""Gradient features: equal to a loop of autograd, and the factored ones to gradients that were formed and projected."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lms import tiny_lm
from synthetic import make_shards
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from ray_dwm.config.selection import DsdmConfig
from ray_dwm.core.losses import token_losses
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError
from ray_dwm.selection import dsdm
from ray_dwm.selection.gradients import dense, factored, per_sample
from ray_dwm.selection.projection import factors, project

K = 64


@pytest.fixture(params=["tied", "untied", "padded"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """A tiny LM; where it is tied, its embedding and its head are one matrix; padding's embedding is not learnt."""
    lm = tiny_lm()
    if request.param != "tied":
        config = lm.config
        config.tie_word_embeddings = False
        config.pad_token_id = 7 if request.param == "padded" else None
        lm = LlamaForCausalLM(config).float().eval()
    return lm


def sequences(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (count, 16), generator=generator)
    return ids, torch.rand(count, 15, generator=generator) < 0.7


def looped(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Gradients of sums of counted cross-entropies over 15, one sequence after the other."""
    parameters = dict(model.named_parameters())
    rows = []
    for one, counted in zip(ids, mask, strict=True):
        loss = token_losses(model(input_ids=one[None]).logits, one[None])[0][counted].sum() / 15
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return dict(zip(parameters, (torch.stack(column) for column in zip(*rows, strict=True)), strict=True))


def test_per_sample_gradients_equal_a_loop(model: LlamaForCausalLM) -> None:
    ids, mask = sequences()
    found, expected = per_sample(model, ids, mask), looped(model, ids, mask)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-4), name


def test_dense_features_are_projected_gradients(model: LlamaForCausalLM) -> None:
    ids, mask = sequences()
    expected = project(looped(model, ids, mask).values(), K, seed=3)
    assert torch.allclose(dense(model, ids, mask, K, seed=3), expected, atol=1e-5)
    assert float(expected.abs().mean()) > 0.01


def test_factored_features_are_gradients_projected_on_both_sides(model: LlamaForCausalLM) -> None:
    ids, mask = sequences()
    matrices = [gradient for gradient in looped(model, ids, mask).values() if gradient.dim() == 3]
    expected = torch.zeros(len(ids), 8, 8)
    for index, gradient in enumerate(matrices):
        left, right = factors(3, index, gradient.shape[1:], 8, ids.device)
        expected += left.T @ gradient @ right
    model.requires_grad_(False)
    found = factored(model, ids, mask, K, seed=3)
    assert torch.allclose(found, expected.flatten(1), atol=1e-5)
    assert float(expected.abs().mean()) > 0.01
    assert all(not module._forward_hooks for module in model.modules())


def test_inner_products_of_both_kinds_are_those_of_the_gradients() -> None:
    """With many features; what the factored ones leave out, the gains, hardly counts."""
    model, (ids, mask) = tiny_lm(), sequences(12)
    ids[1::2, 4:] = ids[::2, 4:]  # pairs that have most in common
    whole = torch.cat([gradient.flatten(1) for gradient in looped(model, ids, mask).values()], dim=1)
    model.requires_grad_(False)
    scale = torch.outer(whole.norm(dim=1), whole.norm(dim=1))
    exact = whole @ whole.T / scale
    for projection, error in ((dense, 0.03), (factored, 0.06)):
        features = projection(model, ids, mask, 4096, 0)
        assert float((features @ features.T / scale - exact).square().mean().sqrt()) < error, projection.__name__
    assert float(exact.fill_diagonal_(0).max()) > 0.5


@pytest.mark.parametrize("projection", ["factored", "dense"])
def test_features_do_not_depend_on_the_batch(tmp_path: Path, projection: str) -> None:
    make_shards(tmp_path / "pool", good=10, noise=3, masked=True)
    tiny_lm().save_pretrained(tmp_path / "lm")
    rows = open_shards(str(tmp_path / "pool")).take(np.arange(13))
    options = DsdmConfig(projection="dense" if projection == "dense" else "factored", features=K)
    look = dsdm.Features(str(tmp_path / "lm"), options, 1, 5)
    expected = look(rows)
    assert expected.shape == (13, K) and expected.dtype == np.float32
    for batch in (4, 13, 100):
        assert dataclasses.replace(look, batch=batch)(rows) == pytest.approx(expected, abs=1e-5)
    assert look(rows[:0]).shape == (0, K)


def test_matrices_without_a_rule_are_named() -> None:
    """GPT-2's Conv1D holds its matrices the other way round; dense needs no rule."""
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, (ids, mask) = GPT2LMHeadModel(config).eval().requires_grad_(False), sequences()
    with pytest.raises(
        DataError, match=r"holds matrices in a Conv1D, .* set selection.dsdm.projection=dense"
    ) as raised:
        factored(model, ids, mask, K, 0)
    assert "\n" not in str(raised.value)
    assert dense(model, ids, mask, K, 0).shape == (5, K)


class SharedPositions(nn.Module):
    """An LM whose position embedding is looked up once for all sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(64, 8), nn.Embedding(16, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        """Logits."""
        del use_cache
        hidden = self.tokens(input_ids) + self.positions(torch.arange(16)[None])
        return type("Output", (), {"logits": self.head(hidden)})


def test_a_module_that_sees_all_sequences_at_once_is_refused() -> None:
    ids, mask = sequences()
    with pytest.raises(DataError, match="holds matrices in a Embedding"):
        factored(SharedPositions().requires_grad_(False), ids, mask, K, 0)
