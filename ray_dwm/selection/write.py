"""Chosen rows as token shards of the usual format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ray_dwm.data.records import replacing
from ray_dwm.data.shards import open_shards, write_shard

ROWS_PER_FILE = 16_384


def shard_name(number: int) -> str:
    """File of the `number`-th part."""
    return f"part-{number:05d}.arrow"


def write_part(number: int, *, pool: str, rows_file: str, output: Path) -> dict[str, Any]:
    """Write the `number`-th part of the chosen rows; the file appears whole, also where two tasks write the same one.

    Args:
        rows_file: a .npy file of the chosen rows, in their order.

    Returns:
        The shard as the manifest lists it, and its rows by domain code.
    """
    reader = open_shards(pool)
    chosen = np.load(rows_file, mmap_mode="r", allow_pickle=False)
    rows = reader.take(np.asarray(chosen[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]))
    names, name = reader.manifest.domain_names, shard_name(number)
    with replacing(output / name) as temporary:
        shard = write_shard(
            temporary,
            sample_ids=rows.sample_ids,
            domains=[names[code] for code in rows.domains],
            input_ids=rows.input_ids,
            vocab_size=reader.manifest.vocab_size,
            loss_mask=rows.loss_mask,
        )
    return {"shard": {**asdict(shard), "name": name}, "rows": np.bincount(rows.domains, minlength=len(names)).tolist()}
