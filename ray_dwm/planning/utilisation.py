"""The MFU that a plan assumes where nobody says: published figures, for want of our own on GPUs."""

from __future__ import annotations

from ray_dwm.core.accounting import Llama

_HOPPER = "torchtitan: Llama 3.1 8B, FSDP2 on 8 to 128 H100s, December 2024"
_AMPERE = "torchtitan: Llama 2 13B, FSDP2 on 64 A100s, 2024"
_EAGER = 33 / 39


def default_mfu(gpu: str, llama: Llama, compiled: bool, bf16: bool) -> tuple[float, str]:
    """(MFU, where it is from): what kernels reach with nothing computed twice and communication hidden.

    torchtitan's benchmarks have 33 % without torch.compile and 39 % with it, on H100s of 500 W with slower memory than
    usual; picotron's README has about 50 % for SmolLM-1.7B, which is not counted on. On A100s, with a third of the peak
    and nearly two thirds of the memory's rate, torchtitan's docs/performance.md has 54 to 61 % for 8B and 13B, of which
    the least is taken for compiled blocks, and 33 / 39 of it for others. Other GPUs are taken to be like an H100. Three
    guesses: matrices narrower than 2048 fill a GPU less, a width of 1024 to four fifths, less to three tenths; fp32,
    outside the tensor cores, 60 %, compiled or not.
    """
    if not bf16:
        return 0.6, "assumed for fp32 outside the tensor cores"
    ampere = gpu.startswith("a100")
    value = (0.54 if ampere else 0.39) * (1 if compiled else eager_share(bf16))
    source = (_AMPERE if ampere else _HOPPER) + (", compiled" if compiled else ", not compiled")
    if llama.width >= 2048:
        return value, source
    share = 0.8 if llama.width >= 1024 else 0.3
    return share * value, f"{share:g} of {value:.0%} for a width of {llama.width} ({source})"


def eager_share(bf16: bool) -> float:
    """MFU without torch.compile over that with it; 1 in fp32, where no difference is assumed."""
    return _EAGER if bf16 else 1.0
