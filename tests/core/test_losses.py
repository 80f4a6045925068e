"""Per-sample losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ray_dwm.core.losses import predicted_mask, sample_losses, sample_statistics


def test_uniform_weights_give_the_token_mean_with_a_mask() -> None:
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(4, 9, 11, generator=g), torch.randint(0, 11, (4, 9), generator=g)
    loss_mask = torch.rand(4, 9, generator=g) > 0.5
    mask = predicted_mask(loss_mask, ids)
    losses = sample_losses(logits, ids, mask, float(mask.sum()) / 4)
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (flat * loss_mask[:, 1:].flatten()).sum() / loss_mask[:, 1:].sum()
    torch.testing.assert_close(losses.mean(), expected)


def test_statistics_of_a_uniform_prediction() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    statistics = sample_statistics(torch.zeros(2, 5, 8), ids, predicted_mask(None, ids))
    torch.testing.assert_close(statistics, torch.full((2, 2), 8.0).log())
