"""Runs a function in real gloo processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...], out: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    try:
        result = function(*arguments)
        if rank == 0:
            torch.save(result, out)
    finally:
        dist.destroy_process_group()


def run(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Rank 0's result of a module-level function that ran in `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "result.pt"
    mp.spawn(_entry, (world, str(folder / "store"), function, arguments, str(out)), nprocs=world)
    return torch.load(out, weights_only=False)
