"""Which kernels torch may take for scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

KERNELS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.enable_cudnn_sdp),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.enable_flash_sdp),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.enable_mem_efficient_sdp),
    "math": (SDPBackend.MATH, torch.backends.cuda.enable_math_sdp),
}
"""Value of lm.attention -> torch's name, and its switch, which counts on the CPU too."""


def allow_kernels(choice: str) -> None:
    """Let this process use one kernel; with `auto` all, of which torch takes the fastest that the device has.

    That is cuDNN's on Hopper and newer, flash attention elsewhere, MATH where nothing else runs; torch knows best. A
    kernel that was named and cannot run is an error of torch's at the first forward. `eager` is not this function's.
    """
    for name, (_, enable) in KERNELS.items():
        enable(choice in ("auto", "eager", name))
