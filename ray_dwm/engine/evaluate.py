"""Loss on fixed sequences of a set, with the sharded LM, during training and at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import Batch, take_share
from ray_dwm.engine.mesh import all_sum
from ray_dwm.errors import TrainingError
from ray_dwm.models.lm import Lm


def spread_rows(reader: ShardReader, sequences: int) -> NDArray[np.int64]:
    """Numbers of `sequences` rows spread evenly over a set, or of all where it has fewer."""
    count = min(sequences, reader.manifest.rows)
    return np.linspace(0, reader.manifest.rows - 1, num=count).astype(np.int64)


def stream(
    reader: ShardReader, rows: NDArray[np.int64], micro_batch: int, seq_len: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's parts of some rows, a micro-batch at a time."""
    size = micro_batch * dist.get_world_size()
    for start in range(0, len(rows), size):
        yield take_share(reader, rows[start : start + size], seq_len, device)


@torch.no_grad()
def mean_loss(model: Lm, batches: Iterable[Batch]) -> float:
    """Cross-entropy in nats per counted token over all ranks' batches.

    Raises:
        TrainingError: where no token counts.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        losses = model(batch.input_ids).losses_bT * batch.mask
        totals = totals.to(losses.device) + torch.stack([losses.sum().double(), batch.mask.sum().double()])
    nats, tokens = all_sum(totals).tolist()
    if tokens == 0:
        raise TrainingError(
            "an evaluation set has no token that counts: its loss_mask is empty within the first lm.seq_len tokens"
        )
    return float(nats / tokens)
