"""exact, jvp and central on a small Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_dwm.core import estimators
from ray_dwm.core.losses import sample_losses
from ray_dwm.models.lm import build_lm, lm_config


def llama_problem() -> tuple[estimators.Losses, list[Tensor], list[Tensor]]:
    """fp32 losses of 6 sequences under a tiny Llama, its parameters and a random direction."""
    model = build_lm(lm_config("tiny", vocab_size=64, seq_len=16), seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (6, 16), generator=generator)
    mask = torch.ones(6, 15, dtype=torch.bool)
    names = [name for name, _ in model.named_parameters()]
    params = [p.detach().clone() for p in model.parameters()]
    direction = [torch.randn(p.shape, generator=generator) for p in params]

    def losses(values: Sequence[Tensor]) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return sample_losses(torch.func.functional_call(model, named, (ids,), tie_weights=True).losses_bT, mask, 15.0)

    return losses, params, direction


def attention_problem() -> tuple[estimators.Losses, list[Tensor], list[Tensor]]:
    """The same in fp64 with one attention layer; transformers' Llama rounds its norms to fp32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (5, 8), generator=generator)
    shapes = [(20, 12), (12, 12), (12, 12), (12, 12), (12, 20)]
    params = [0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    direction = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def losses(values: Sequence[Tensor]) -> Tensor:
        embedding, q, k, v, out = values
        x = embedding[ids]
        mixed = F.scaled_dot_product_attention((x @ q)[:, None], (x @ k)[:, None], (x @ v)[:, None], is_causal=True)
        logits = torch.tanh(x + mixed[:, 0]) @ out
        return -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)

    return losses, params, direction


def test_jvp_equals_exact_in_fp64() -> None:
    losses, params, direction = attention_problem()
    with sdpa_kernel(SDPBackend.MATH):
        exact = estimators.exact(losses, params, direction)
        jvp = estimators.jvp(losses, params, direction)
    torch.testing.assert_close(jvp, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("problem", "step", "bar"), [(llama_problem, 1e-2, 0.9999), (attention_problem, 1e-4, 1 - 1e-9)]
)
def test_central_points_where_exact_points(problem: Callable[[], Any], step: float, bar: float) -> None:
    losses, params, direction = problem()
    norm = float(torch.cat([u.flatten() for u in direction]).norm())
    exact = estimators.exact(losses, params, direction)
    central = estimators.central(losses, params, direction, step / norm)
    cosine = F.cosine_similarity(central - central.mean(), exact - exact.mean(), dim=0)
    assert float(cosine) >= bar


def test_exact_on_a_linear_problem_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    got = estimators.exact(lambda p: x @ p[0], [torch.zeros(2, dtype=torch.float64)], [torch.tensor([2.0, 0.5])])
    assert got.tolist() == [3.0, 5.5]
