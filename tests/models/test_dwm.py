"""What every DWM promises: a uniform start, joint weights, no order, no LM's scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ray_dwm.core.weighting import weights_from_scores
from ray_dwm.models.dwm import SIZES, DataWeightingModel, build_dwm, dwm_shape

VOCAB, B, T = 50, 8, 12


def trained(size: str, lm_features: bool = False) -> DataWeightingModel:
    """A DWM whose score head is no longer zero."""
    model = build_dwm(dwm_shape(size, VOCAB, lm_features), seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (B, T), generator=g), torch.rand(B, 2, generator=g)


@pytest.mark.parametrize("lm_features", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_starts_exactly_uniform(size: str, lm_features: bool) -> None:
    ids, statistics = inputs()
    model = build_dwm(dwm_shape(size, VOCAB, lm_features), seed=0)
    weights = weights_from_scores(model(ids, statistics if lm_features else None))
    assert torch.equal(weights, torch.full((B,), 1 / B))


@pytest.mark.parametrize("size", SIZES)
def test_permuting_the_batch_permutes_the_scores(size: str) -> None:
    ids, _ = inputs()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    model = trained(size)
    torch.testing.assert_close(model(ids[order]), model(ids)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_replacing_one_sample_changes_the_ratio_of_two_others(size: str) -> None:
    ids, _ = inputs()
    changed = ids.clone()
    changed[0] = (changed[0] + 7) % VOCAB
    model = trained(size)
    before, after = (weights_from_scores(model(x).detach()) for x in (ids, changed))
    ratio = float((before[1] / before[2]) / (after[1] / after[2]))
    assert abs(ratio - 1) > 1e-4


def test_without_batch_attention_every_sequence_is_scored_by_itself() -> None:
    ids, _ = inputs()
    changed = ids.clone()
    changed[0] = (changed[0] + 7) % VOCAB
    model = build_dwm(dwm_shape("s", VOCAB, batch_attention=False), seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    before, after = (model(x).detach() for x in (ids, changed))
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-6)
    assert abs(float(after[0] - before[0])) > 1e-3


def test_order_within_a_sequence_matters() -> None:
    ids, _ = inputs()
    model = trained("xs")
    assert not torch.allclose(model.encode(ids), model.encode(ids.flip(1)), atol=1e-3)


def test_statistics_have_no_scale_and_no_offset() -> None:
    ids, statistics = inputs()
    model = trained("xs", lm_features=True)
    scores = model(ids, statistics)
    torch.testing.assert_close(model(ids, 3.0 * statistics + 5.0), scores, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids, statistics.flip(0)), scores, atol=1e-3)


def test_the_same_seed_gives_the_same_dwm_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    left, right = (build_dwm(dwm_shape("s", VOCAB), seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_grow() -> None:
    counts = [sum(p.numel() for p in build_dwm(dwm_shape(size, VOCAB), 0).parameters()) for size in SIZES]
    assert counts == sorted(counts)
    assert counts[-1] > 10 * counts[0]
