"""Per-sample losses of a causal LM.

Legend: B = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_BTV: Tensor, input_ids_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every next token, shape (B, T-1), computed in fp32."""
    # Targets are shifted, not logits: a slice of the logits would be copied.
    targets_BT = F.pad(input_ids_BT[:, 1:], (0, 1), value=-100)
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return losses_N.view(input_ids_BT.shape)[:, :-1]


def predicted_mask(loss_mask_BT: Tensor | None, input_ids_BT: Tensor) -> Tensor:
    """Which of the T-1 predictions count, shape (B, T-1); all of them where there is no mask."""
    if loss_mask_BT is None:
        return torch.ones_like(input_ids_BT[:, 1:], dtype=torch.bool)
    return loss_mask_BT[:, 1:]


def sample_losses(logits_BTV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor, tokens_per_sample: float) -> Tensor:
    """l_i = (sum of token cross-entropies of sample i) / (mean unmasked tokens per sample in the global batch).

    With this normalisation uniform weights 1/B give the mean over all tokens of the global batch exactly,
    so a uniform DWM run is plain training.

    Args:
        logits_BTV: logits, shape (B, T, V).
        input_ids_BT: token ids, shape (B, T).
        mask_BT: `predicted_mask`, shape (B, T-1).
        tokens_per_sample: mean number of counted predictions per sample over the GLOBAL batch.

    Returns:
        Losses in nats, shape (B,).
    """
    losses_BT = token_losses(logits_BTV, input_ids_BT) * mask_BT
    return losses_BT.sum(dim=1) / tokens_per_sample


def sample_statistics(logits_BTV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean loss and mean predictive entropy of each sample in nats, shape (B, 2): what a DWM may look at."""
    logits_BTV = logits_BTV[:, :-1].detach().float()
    log_p_BTV = torch.log_softmax(logits_BTV, dim=-1)
    loss_BT = -log_p_BTV.gather(-1, input_ids_BT[:, 1:, None]).squeeze(-1)
    entropy_BT = -(log_p_BTV.exp() * log_p_BTV).sum(dim=-1)
    counted_B = mask_BT.sum(dim=1).clamp(min=1)
    return torch.stack([(x * mask_BT).sum(dim=1) / counted_B for x in (loss_BT, entropy_BT)], dim=1)
