"""Runs functions in real gloo process groups: of one in this process, of more in others."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports once and runs nothing, so forking from it is quick and safe.
# Every rank imports what is not preloaded, and again the module that is run as the main one: pytest's.
multiprocessing.set_forkserver_preload(
    ["pytest", "transformers.models.llama.modeling_llama", "ray_dwm.engine.loop", "ray_dwm.engine.export"]
)


def _entry(
    rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...], out: str
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    shared = dist.HashStore() if world == 1 else dist.FileStore(store, world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=shared)
    try:
        result = function(*arguments)
        if rank == 0:
            torch.save(result, out)
    finally:
        dist.destroy_process_group()
    if world > 1:
        # Gloo's threads may still hold tensors, and abort the process where the interpreter winds down under them.
        os._exit(0)


def run(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Rank 0's result of a module-level function that ran in `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "result.pt"
    store = folder / f"store-{uuid.uuid4().hex}"  # a new file each time: an earlier group may still hold the old one
    if world == 1:
        with patch.dict(os.environ):  # this process lives on, and other libraries read LOCAL_RANK too
            _entry(0, 1, str(store), function, arguments, str(out))
    else:
        mp.start_processes(
            _entry,
            (world, str(store), function, arguments, str(out)),
            nprocs=world,
            start_method="forkserver",
        )
    return torch.load(out, weights_only=False)


def run_all(folder: Path, function: Callable[..., Any], calls: dict[Any, tuple[Any, ...]]) -> dict[Any, Any]:
    """What `run` gives for every call, name -> (world, *arguments); those of one size share a process group."""
    found: dict[Any, Any] = {}
    for world in sorted({world for world, *_ in calls.values()}):
        own = {name: arguments for name, (size, *arguments) in calls.items() if size == world}
        found |= run(world, folder / f"world-{world}", _each, function, own)
    return found


def _each(function: Callable[..., Any], calls: dict[Any, list[Any]]) -> dict[Any, Any]:
    found = {}
    for name, arguments in calls.items():
        torch.manual_seed(0)  # whatever the calls before have drawn
        try:
            found[name] = function(*arguments)
        except BaseException as error:
            error.add_note(f"in the call {name}")
            raise
    return found
