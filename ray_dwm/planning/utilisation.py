"""The MFU that a plan assumes where nobody says: published figures, for want of our own on GPUs."""

from __future__ import annotations

from ray_dwm.core.accounting import Llama

_HOPPER = "torchtitan: Llama 3.1 8B, FSDP2 on 8 to 128 H100s, December 2024"
_AMPERE = "below TinyLlama's 59 % (1.1B at 24,100 tokens/s on an A100, with fused kernels that are not used here)"


def default_mfu(gpu: str, llama: Llama, compiled: bool, bf16: bool) -> tuple[float, str]:
    """(MFU, where it is from): what kernels reach with nothing computed twice and communication hidden.

    torchtitan's table has 33 % without torch.compile and 39 % with it. On an A100, whose peak is a third and whose
    memory nearly two thirds as fast, published figures are higher: 50 %, and 42 % in the same proportion. picotron's
    README has about 50 % for SmolLM-1.7B on eight H100s, which is not counted on. Three guesses: matrices narrower than
    2048 fill a GPU less, a width of 1024 to four fifths, less to three tenths; fp32, outside the tensor cores, 60 %.
    """
    if not bf16:
        return 0.6, "assumed for fp32 outside the tensor cores"
    ampere = gpu.startswith("a100")
    value = (0.50 if compiled else 0.42) if ampere else (0.39 if compiled else 0.33)
    source = (_AMPERE if ampere else _HOPPER) + (", compiled" if compiled else ", not compiled")
    if llama.width >= 2048:
        return value, source
    share = 0.8 if llama.width >= 1024 else 0.3
    return share * value, f"{share:g} of {value:.0%} for a width of {llama.width} ({source})"
