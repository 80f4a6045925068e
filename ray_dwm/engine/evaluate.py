"""Loss on fixed sequences of a set, with the sharded LM, during training and at its end."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from ray_dwm.core.losses import token_losses
from ray_dwm.data.shards import ShardReader
from ray_dwm.engine.batch import Batch, to_batch
from ray_dwm.engine.mesh import all_sum


def fixed_share(reader: ShardReader, sequences: int, seq_len: int, device: torch.device) -> Batch:
    """This rank's part of `sequences` rows spread evenly over a set, or of all where it has fewer.

    Every rank gets the same number, so that collectives match: what one lacks is a repeated row that does not count.
    """
    rank, world, count = dist.get_rank(), dist.get_world_size(), min(sequences, reader.manifest.rows)
    rows = np.linspace(0, reader.manifest.rows - 1, num=count).astype(np.int64)
    padded = np.pad(rows, (0, -count % world), mode="edge")
    batch = to_batch(reader.take(padded[rank::world]), seq_len, device)
    counted = torch.arange(rank, len(padded), world, device=device) < count
    return dataclasses.replace(batch, mask=batch.mask & counted[:, None])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, batch: Batch, micro_batch: int) -> float:
    """Cross-entropy in nats per counted token over all ranks' shares."""
    totals = torch.zeros(2, dtype=torch.float64, device=batch.input_ids.device)
    for part in batch.micro_batches(micro_batch):
        losses = token_losses(model(input_ids=part.input_ids).logits, part.input_ids) * part.mask
        totals += torch.stack([losses.sum().double(), part.mask.sum().double()])
    nats, tokens = all_sum(totals).tolist()
    return float(nats / tokens)
