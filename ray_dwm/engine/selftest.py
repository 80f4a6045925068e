"""What a device's attention kernels and a process group can do, found by trying.

`ray-dwm doctor` runs these where the run's workers would be. Nothing here needs Ray, data or an LM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_dwm.engine.attention import KERNELS
from ray_dwm.engine.clock import synchronize
from ray_dwm.engine.mesh import all_sum, device, init_mesh

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference from the float64 result, for outputs of the size of 1 (bf16 has 8 bits)."""
_REDUCED_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionProbe:
    """Kernels of scaled_dot_product_attention that worked on a device."""

    device: str
    trains: tuple[str, ...]
    """Forward and backward run, and the output is right."""
    forward_mode: tuple[str, ...]
    """torch.func.jvp runs too."""
    auto: str
    """The kernel that torch takes where it may choose."""


def probe_attention(*, head_dim: int, seq_len: int, precision: str) -> AttentionProbe:
    """Try every kernel on one short batch of causal attention, as the LM calls it.

    Args:
        precision: fp32 or bf16, as train.precision.
    """
    place = device()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, seq_len, head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(place, dtype) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        right = _attend(query.double(), key.double(), value.double())
    kernels = {name: kernel for name, (kernel, _) in KERNELS.items()}
    trains = tuple(name for name, kernel in kernels.items() if _trains(kernel, (query, key, value), right))
    forward_mode = tuple(name for name in trains if _has_jvp(kernels[name], (query, key, value)))
    query, key, value = (x.requires_grad_() for x in (query, key, value))  # some kernels have no backward
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=True))
    auto = next((name for name, kernel in kernels.items() if kernel == chosen), "none")
    return AttentionProbe(device=_device_name(place), trains=trains, forward_mode=forward_mode, auto=auto)


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _trains(kernel: SDPBackend, inputs: tuple[Tensor, ...], right: Tensor) -> bool:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    try:
        with sdpa_kernel(kernel):
            output = _attend(*inputs)
            output.sum().backward()
    except (RuntimeError, NotImplementedError):  # a kernel that the device, shape or dtype rules out
        return False
    gradients_finite = all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)
    return gradients_finite and float((output.detach() - right).abs().max()) < _TOLERANCE[output.dtype]


def _has_jvp(kernel: SDPBackend, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with sdpa_kernel(kernel):
            tangent = torch.func.jvp(_attend, inputs, inputs)[1]
    except (RuntimeError, NotImplementedError):  # fused kernels have no forward derivative
        return False
    return bool(tangent.isfinite().all())


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupProbe:
    """What a process group did, as its first rank saw it."""

    backend: str
    world: int
    device: str
    sum_is_right: bool
    fsdp_error: float
    """Largest difference between a parameter after one FSDP2 step and after the same step unsharded, over all ranks."""
    bytes_per_s: float
    """All-reduce of 16 MiB: bytes of the tensor over seconds."""


def probe_group(shard: int = 0, timeout_s: float = 60.0) -> GroupProbe:
    """Join the process group as a run does, and try it; collective over all its ranks."""
    mesh = init_mesh(shard, timeout_s)
    rank, world, place = dist.get_rank(), dist.get_world_size(), device()
    total = all_sum(torch.tensor([rank + 1.0], device=place))
    return GroupProbe(
        backend=str(dist.get_backend()),
        world=world,
        device=_device_name(place),
        sum_is_right=float(total) == world * (world + 1) / 2,
        fsdp_error=_fsdp_error(rank, world, place, mesh),
        bytes_per_s=_all_reduce_rate(place),
    )


def _fsdp_error(rank: int, world: int, place: torch.device, mesh: DeviceMesh) -> float:
    from torch.distributed.fsdp import fully_shard  # takes a second, and not all who import this probe it

    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(4 * world, 16, generator=generator).to(place)
    plain, sharded = _two_layers().to(place), _two_layers().to(place)
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    _step(plain, x_BD)
    _step(sharded, x_BD[4 * rank : 4 * rank + 4])
    largest = torch.zeros(1, device=place)
    for ours, right in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        largest = torch.maximum(largest, (ours.full_tensor() - right).detach().abs().max())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _two_layers() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def _step(model: nn.Module, x_bD: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(x_bD) - x_bD).square().mean().backward()
    optimizer.step()


def _all_reduce_rate(place: torch.device, repeats: int = 4) -> float:
    values = torch.zeros(_REDUCED_BYTES // 4, device=place)
    dist.all_reduce(values)  # connections are made by the first one
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(values)
    synchronize()
    return repeats * _REDUCED_BYTES / (time.perf_counter() - begin)
