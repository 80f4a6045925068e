"""Proxy LMs: small ones through which a method looks at sequences."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import nn

from ray_dwm.data.shards import open_shards
from ray_dwm.engine.mesh import device
from ray_dwm.errors import DataError
from ray_dwm.evaluation.perplexity import load_lm, row_losses

_CHECKED_ROWS = 64


@lru_cache(maxsize=8)
def load_proxy(folder: str) -> nn.Module:
    """A proxy LM in fp32 on this process's device, in evaluation mode and frozen, loaded once."""
    return load_lm(Path(folder)).to(device()).requires_grad_(False)


def check_proxy(folder: str, pool: str, batch: int) -> None:
    """Make sure that a proxy knows more of the pool than nothing.

    Raises:
        DataError: its loss over rows spread over the pool is not finite, or no lower than that of guessing.
    """
    reader, model = open_shards(pool), load_proxy(folder)
    rows = np.unique(np.linspace(0, reader.manifest.rows - 1, _CHECKED_ROWS).astype(np.int64))
    parts = [row_losses(model, reader.take(rows[start : start + batch])) for start in range(0, len(rows), batch)]
    nats, tokens = (sum(float(part[i].sum()) for part in parts) for i in (0, 1))
    loss, guessing = nats / tokens, math.log(reader.manifest.vocab_size)
    if not loss < guessing:  # so that NaN does not pass
        raise DataError(
            f"proxy LM {folder} has a loss of {loss:.3f} nats a token on the pool, guessing has {guessing:.3f}: it has "
            "diverged or learnt nothing, train it with a lower selection.proxy.lr or more selection.proxy.steps, or "
            "name others in selection.proxy.folders"
        )
