"""Proxy LMs of seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from synthetic import VOCAB
from transformers import LlamaForCausalLM

from ray_dwm.core.losses import token_losses
from ray_dwm.data.shards import open_shards
from ray_dwm.models.lm import lm_config


def tiny_lm(trained_on: Path | None = None, steps: int = 0, vocab: int = VOCAB, seed: int = 0) -> LlamaForCausalLM:
    """The preset `tiny`, after some steps of Adam on random rows of a folder."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(lm_config("tiny", vocab_size=vocab, seq_len=64)).float()
    if trained_on is not None:
        rows = open_shards(str(trained_on)).take(np.arange(open_shards(str(trained_on)).manifest.rows))
        ids = torch.from_numpy(rows.input_ids.astype(np.int64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = ids[torch.randint(len(ids), (32,))]
            token_losses(model(input_ids=batch).logits, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
