"""Process group, device and the few collectives that the engine needs.

"rank" and "world" always mean the data-parallel ones; at world 1 every collective is the identity.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor


def device() -> torch.device:
    """This process's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def init_mesh(timeout_s: float = 600.0) -> DeviceMesh:
    """The data-parallel mesh; joins the process group of torchrun or Ray, or makes one of a single process."""
    kind = device().type
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    if kind == "cuda":
        torch.cuda.set_device(device())
    return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))


def is_main() -> bool:
    """Whether this is rank 0."""
    return dist.get_rank() == 0


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over ranks."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def all_gather_rows(local: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; every rank brings the same number.

    Of a batch's shares, `[:B]` are the B sequences and the rest is padding.
    """
    world = dist.get_world_size()
    if world == 1:
        return local
    gathered = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(gathered, local.contiguous())
    return torch.cat(gathered)


def own_rows(values_B: Tensor, share: int) -> Tensor:
    """This rank's share of what is known of a whole batch, (share,); 0 where the share is padded."""
    padded = F.pad(values_B, (0, share * dist.get_world_size() - len(values_B)))
    start = dist.get_rank() * share
    return padded[start : start + share]


def shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards_norm(tensors: list[Tensor]) -> float:
    """Euclidean norm over all parameters and all ranks' shards, to about single precision."""
    squares = torch.stack([norm.double().square() for norm in torch._foreach_norm(tensors)])
    return float(all_sum(squares.sum()).sqrt())


def shards_dot(left: list[Tensor], right: list[Tensor]) -> float:
    """Inner product over all parameters and all ranks' shards."""
    # Products in place of copies in double; sums of a tensor in its own precision, by halves, of all in double.
    local = torch.stack([(a * b).sum().double() for a, b in zip(left, right, strict=True)]).sum()
    return float(all_sum(local))
