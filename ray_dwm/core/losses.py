"""Per-sample losses of a causal LM.

Legend: B = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_tokens(input_ids_BT: Tensor) -> Tensor:
    """What is to be predicted at every position, (B, T); -100, which no loss counts, at the last."""
    return F.pad(input_ids_BT[:, 1:], (0, 1), value=-100)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every target, (B, T), computed in fp32; 0 where there is none."""
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return losses_N.view(targets_BT.shape)


def entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy in nats of every prediction, (B, T), computed in fp32."""
    log_p_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    return -(log_p_BTV.exp() * log_p_BTV).sum(dim=-1)


def token_losses(logits_BTV: Tensor, input_ids_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every next token, (B, T-1), computed in fp32."""
    # Targets are shifted, not logits: a slice of the logits would be copied.
    return cross_entropy(logits_BTV, next_tokens(input_ids_BT))[:, :-1]


def predicted_mask(loss_mask_BT: Tensor | None, input_ids_BT: Tensor) -> Tensor:
    """Which of the T-1 predictions count, (B, T-1); all of them where there is no mask."""
    if loss_mask_BT is None:
        return torch.ones_like(input_ids_BT[:, 1:], dtype=torch.bool)
    return loss_mask_BT[:, 1:]


def sample_losses(losses_BT: Tensor, mask_BT: Tensor, tokens_per_sample: float) -> Tensor:
    """l_i = (sum of token cross-entropies of sample i) / (mean unmasked tokens per sample in the global batch).

    With this normalisation uniform weights 1/B give the mean over all tokens of the global batch exactly,
    so a uniform DWM run is plain training.

    Args:
        losses_BT: cross-entropies of the predictions, (B, T-1).
        mask_BT: `predicted_mask`, (B, T-1).
        tokens_per_sample: mean number of counted predictions per sample over the GLOBAL batch.

    Returns:
        Losses in nats, (B,).
    """
    return (losses_BT * mask_BT).sum(dim=1) / tokens_per_sample


def sample_means(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of every sample over its counted predictions, (B, T-1) -> (B,); 0 where none counts."""
    return (values_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
