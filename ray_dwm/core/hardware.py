"""GPUs for planning: peak FLOP/s, memory, links, their host. Vendors' figures, dense, SI units, one direction.

Vendors print tensor-core rates with 2:4 sparsity and links' rates in both directions: both are halved here. `memory` is
not the number on the box but what CUDA reports (`torch.cuda.mem_get_info`, "total capacity" in torch's out-of-memory
message), which is more than the nominal 10^9 bytes with HBM and less with ECC in GDDR6; it differs by some 0.1 GiB
between drivers, and the least that was found is taken. Rates between nodes and memory of hosts are those of the
vendor's own reference systems, or assumed where there is none: another cluster has others, which is why a plan takes
them as options.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU in the usual node."""

    bf16: float
    """Dense tensor-core FLOP/s, sums in fp32."""
    fp32: float
    """FLOP/s outside the tensor cores: what fp32 training runs at, since TF32 is off."""
    memory: float
    """Bytes that CUDA reports."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the other GPUs of its node."""
    nvlink: bool = True
    """Whether that link is NVLink with a switch; else PCIe, by way of the hosts' bridges."""
    network: float
    """Bytes/s to other nodes, of the part of the node's network that falls to one GPU."""
    host: float
    """Bytes/s to its host's memory (PCIe x16)."""
    host_memory: float
    """Bytes of a whole node's host."""
    per_node: int = 8

    def peak(self, bf16: bool) -> float:
        """Dense FLOP/s of a compute dtype."""
        return self.bf16 if bf16 else self.fp32


PCIE4, PCIE5 = 32e9, 64e9
"""x16, one direction (PCI-SIG): 31.5 and 63 GB/s, rounded as vendors do."""

GPUS = {
    # NVIDIA A100 datasheet, June 2021: 312 TFLOPS dense (624 sparse), 19.5 fp32; 40 GB at 1,555 GB/s, 80 GB SXM at
    # 2,039 GB/s; NVLink 600 GB/s both ways. DGX A100 datasheet: one 200 Gb/s HDR InfiniBand port for each GPU, 1 TB of
    # host memory with 40 GB GPUs, 2 TB with 80 GB. Total capacity: 40,339 MiB (huggingface.co/PrunaAI, results.json of
    # smashed models), 79.25 GiB (GitHub levihsu/OOTDiffusion issue 235).
    "a100-40g": Gpu(
        bf16=312e12,
        fp32=19.5e12,
        memory=39.39 * GIB,
        bandwidth=1.555e12,
        link=300e9,
        network=25e9,
        host=PCIE4,
        host_memory=1e12,
    ),
    "a100": Gpu(
        bf16=312e12,
        fp32=19.5e12,
        memory=79.25 * GIB,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        host=PCIE4,
        host_memory=2e12,
    ),
    # NVIDIA H100 datasheet, 2023-24, SXM: 1,979 TFLOPS sparse, 67 fp32; 80 GB at 3.35 TB/s; NVLink 900 GB/s both ways.
    # DGX H100 datasheet: one 400 Gb/s ConnectX-7 for each GPU. Host: 2 TB (NVIDIA DGX BasePOD reference architecture,
    # core components). Total capacity: 79.11 GiB (vLLM issue 27508).
    "h100": Gpu(
        bf16=989.5e12,
        fp32=67e12,
        memory=79.11 * GIB,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        host=PCIE5,
        host_memory=2e12,
    ),
    # The same datasheet, 2022-23, PCIe: 1,513 TFLOPS sparse, 51 fp32; 80 GB at 2 TB/s; PCIe 5. Bridges between pairs
    # (600 GB/s) do not help a ring of eight: PCIe is its link. Assumed: the SXM's total capacity, 200 Gb/s for each
    # GPU, and a host with twice its GPUs' nominal memory.
    "h100-pcie": Gpu(
        bf16=756.5e12,
        fp32=51e12,
        memory=79.11 * GIB,
        bandwidth=2e12,
        link=PCIE5,
        nvlink=False,
        network=25e9,
        host=PCIE5,
        host_memory=1.28e12,
    ),
    # NVIDIA H200 datasheet, November 2023: as H100 SXM, with 141 GB at 4.8 TB/s. DGX H200: as DGX H100. Total capacity:
    # 139.72 GiB, the least of public logs (up to 139.81).
    "h200": Gpu(
        bf16=989.5e12,
        fp32=67e12,
        memory=139.72 * GIB,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        host=PCIE5,
        host_memory=2e12,
    ),
    # NVIDIA DGX/HGX B200 datasheets, 2024-25: 4.5 PFLOPS sparse, 75 TFLOPS fp32 (600 for eight); 180 GB (1,440 for
    # eight) at 8 TB/s; NVLink 5, 1.8 TB/s both ways; one 400 Gb/s ConnectX-7 for each GPU. Host: 2 TB (DGX B200 user
    # guide). Total capacity: 178.35 GiB (pytorch/ao pull request 4002).
    "b200": Gpu(
        bf16=2.25e15,
        fp32=75e12,
        memory=178.35 * GIB,
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        host=PCIE5,
        host_memory=2e12,
    ),
    # NVIDIA L40S datasheet, 2023: 362.05 TFLOPS dense (733 sparse), 91.6 fp32; 48 GB at 864 GB/s; PCIe 4. Total
    # capacity: 44.40 GiB, that of an L40, which has the same memory (Qwen3-VL issue 2097). Assumed: 100 Gb/s for each
    # GPU, and a host with twice its GPUs' nominal memory.
    "l40s": Gpu(
        bf16=362e12,
        fp32=91.6e12,
        memory=44.40 * GIB,
        bandwidth=864e9,
        link=PCIE4,
        nvlink=False,
        network=12.5e9,
        host=PCIE4,
        host_memory=768e9,
    ),
    # NVIDIA Ada GPU architecture whitepaper, 2022, appendix A: 165.2 TFLOPS dense with sums in fp32 (330.3 sparse),
    # 82.6 fp32; 24 GB at 1,008 GB/s; PCIe 4. Total capacity: 23.52 GiB (SoulX-FlashTalk issue 5). Assumed: 25 Gb/s for
    # each GPU, and a host with twice its GPUs' nominal memory.
    "rtx4090": Gpu(
        bf16=165.2e12,
        fp32=82.6e12,
        memory=23.52 * GIB,
        bandwidth=1.008e12,
        link=PCIE4,
        nvlink=False,
        network=3.125e9,
        host=PCIE4,
        host_memory=384e9,
    ),
}


def gpu(name: str) -> Gpu:
    """A kind of GPU by name, in small or capital letters.

    Raises:
        ConfigError: where it is not known.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu is {name!r}: it must be one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


_NAMES = {
    "a100-40g": ("a100", "40gb"),
    "a100": ("a100",),
    "h100-pcie": ("h100", "pcie"),
    "h100": ("h100",),
    "h200": ("h200",),
    "b200": ("b200",),
    "l40s": ("l40s",),
    "rtx4090": ("rtx 4090",),
}
"""Parts of what NVIDIA's driver calls them, the more particular first."""
_OTHERS = ("nvl", "mig", "gb200", "gh200", "laptop", "4090 d")
"""Parts of the names of relatives with another peak: no MFU is better than a wrong one."""


def recognise(device_name: str) -> Gpu | None:
    """The kind of GPU that a driver means, as in `NVIDIA H100 80GB HBM3`; None where it is none of these."""
    lower = device_name.lower()
    if any(part in lower for part in _OTHERS):
        return None
    return next((GPUS[name] for name, parts in _NAMES.items() if all(part in lower for part in parts)), None)
