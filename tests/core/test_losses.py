"""Per-sample losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ray_dwm.core.losses import (
    cross_entropy,
    entropy,
    next_tokens,
    predicted_mask,
    sample_losses,
    sample_means,
    token_losses,
)


def test_uniform_weights_give_the_token_mean_with_a_mask() -> None:
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(4, 9, 11, generator=g), torch.randint(0, 11, (4, 9), generator=g)
    loss_mask = torch.rand(4, 9, generator=g) > 0.5
    mask = predicted_mask(loss_mask, ids)
    losses = sample_losses(token_losses(logits, ids), mask, float(mask.sum()) / 4)
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (flat * loss_mask[:, 1:].flatten()).sum() / loss_mask[:, 1:].sum()
    torch.testing.assert_close(losses.mean(), expected)


def test_a_uniform_prediction_has_the_entropy_and_the_loss_of_its_vocabulary() -> None:
    ids, logits = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, 8)
    expected = torch.full((2, 5), 8.0).log()
    torch.testing.assert_close(entropy(logits), expected)
    expected[:, -1] = 0.0  # nothing follows the last token
    torch.testing.assert_close(cross_entropy(logits, next_tokens(ids)), expected)


def test_means_are_over_what_counts() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(sample_means(values, mask), torch.tensor([3.5, 0.0]))
