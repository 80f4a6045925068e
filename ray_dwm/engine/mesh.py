"""Process group, device and the few collectives that the engine needs.

"rank" and "world" always mean the data-parallel ones; at world 1 every collective is the identity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ray_dwm.errors import ConfigError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Of the process group; on a GPU, what a checkpoint or an offloaded optimizer holds in the host's memory needs gloo."""
TIMEOUT_S = 600.0
"""For which a rank waits for the others in a collective of any process group, before the run is taken for hung."""


def device() -> torch.device:
    """This process's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def take_device() -> None:
    """Make this process's GPU, where it has one, that of the calling thread: every new thread starts at GPU 0."""
    if (own := device()).type == "cuda":
        torch.cuda.set_device(own)


def init_mesh(shard: int = 0, timeout_s: float = TIMEOUT_S) -> DeviceMesh:
    """The data-parallel mesh; joins the process group of torchrun or Ray, or makes one of a single process.

    Args:
        shard: ranks that share one copy of the LM, neighbours by rank; 0: all of them.

    Returns:
        A mesh of (dp_shard), or of (dp_replicate, dp_shard) where there are several copies (HSDP).

    Raises:
        ConfigError: `shard` does not divide the number of ranks.
    """
    kind = device().type
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(BACKENDS[kind], timeout=timeout)
        else:
            dist.init_process_group(BACKENDS[kind], rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    take_device()
    world = dist.get_world_size()
    if shard == 0 or shard == world:
        return init_device_mesh(kind, (world,), mesh_dim_names=("dp_shard",))
    if world % shard:
        raise ConfigError(f"parallel.shard is {shard}, which does not divide {world} workers: use a divisor, or 0")
    return init_device_mesh(kind, (world // shard, shard), mesh_dim_names=("dp_replicate", "dp_shard"))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the LM lies on the ranks."""

    mesh: DeviceMesh

    @property
    def shards(self) -> int:
        """Ranks that share one copy."""
        return self.mesh["dp_shard"].size()

    @property
    def shard(self) -> int:
        """Which part of its copy this rank holds."""
        return self.mesh["dp_shard"].get_local_rank()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks of a copy: what is summed over shards must be counted once for all copies."""
        values = values.clone()
        dist.all_reduce(values, group=self.mesh["dp_shard"].get_group())
        return values

    def norm(self, tensors: list[Tensor]) -> float:
        """Euclidean norm over all parameters and all shards, to about single precision."""
        squares = torch.stack([norm.double().square() for norm in torch._foreach_norm(tensors)])
        return float(self.sum(squares.sum()).sqrt())

    def dot(self, left: list[Tensor], right: list[Tensor]) -> float:
        """Inner product over all parameters and all shards."""
        # Products in place of copies in double; sums of a tensor in its own precision, by halves, of all in double.
        local = torch.stack([(a * b).sum().double() for a, b in zip(left, right, strict=True)]).sum()
        return float(self.sum(local))


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
