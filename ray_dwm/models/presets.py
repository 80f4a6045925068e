"""The LM's presets: shapes of a Llama, and what follows from them by formula.

| preset | width | layers | heads | MLP width | vocabulary | parameters |
|---|---|---|---|---|---|---|
| tiny | 32 | 2 | 2 | 64 | data's | tests |
| quickstart | 96 | 4 | 4 | 256 | data's (8192) | 1.23 M |
| 5m | 192 | 8 | 8 | 512 | data's (8192) | 5.12 M |
| 30m | 384 | 6 | 6 | 1024 | data's (8192) | 16.91 M (35.20 M at 32000) |
| 370m | 1024 | 24 | 16 | 2816 | 32000 | 373.9 M |
| 1.3b | 2048 | 24 | 16 | 5504 | 32000 | 1345.4 M |
| 7b | 4096 | 32 | 32 | 11008 | 32000 | 6738.4 M |
| 13b | 5120 | 40 | 40 | 13824 | 32000 | 13015.9 M |
| 70b | 8192 | 80 | 64 (8 of keys and values) | 28672 | 32000 | 68976.6 M |

370m and 1.3b follow the Llama shape at the sizes of the method's evaluation (arXiv 2507.16178, section 4,
names the sizes but not the shapes: widths, depths and tying are ours; 24 layers of 2048 are those of
GPT-3 XL and Pythia-1.4B, the MLP is 8/3 of the width rounded up to a multiple of 128). 7b, 13b and 70b are Llama 2's
(Touvron et al. 2023, arXiv 2307.09288, and the config.json of its releases).
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.core.accounting import Llama
from ray_dwm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LmShape:
    """Shape of a Llama; `tied` shares the input and output embedding."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    tied: bool
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as of queries, more than one of which share them otherwise (GQA)."""

    @property
    def heads_of_keys(self) -> int:
        """Heads of keys and values, resolved."""
        return self.kv_heads or self.heads


PRESETS = {
    "tiny": LmShape(width=32, layers=2, heads=2, mlp_width=64, tied=True),
    "quickstart": LmShape(width=96, layers=4, heads=4, mlp_width=256, tied=True),
    "5m": LmShape(width=192, layers=8, heads=8, mlp_width=512, tied=True),
    "30m": LmShape(width=384, layers=6, heads=6, mlp_width=1024, tied=False),
    "370m": LmShape(width=1024, layers=24, heads=16, mlp_width=2816, tied=False),
    "1.3b": LmShape(width=2048, layers=24, heads=16, mlp_width=5504, tied=False),
    "7b": LmShape(width=4096, layers=32, heads=32, mlp_width=11008, tied=False),
    "13b": LmShape(width=5120, layers=40, heads=40, mlp_width=13824, tied=False),
    "70b": LmShape(width=8192, layers=80, heads=64, mlp_width=28672, tied=False, kv_heads=8),
}


def lm_shape(preset: str) -> LmShape:
    """The shape of a preset.

    Raises:
        ConfigError: where there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"lm.preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def llama(preset: str, vocab_size: int) -> Llama:
    """A preset as the numbers that say what it costs."""
    shape = lm_shape(preset)
    return Llama(
        vocab=vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.heads_of_keys,
        mlp_width=shape.mlp_width,
        tied=shape.tied,
    )


def parameter_count(preset: str, vocab_size: int) -> int:
    """Parameters of a preset, by formula."""
    return llama(preset, vocab_size).parameters


def flops_per_token(preset: str, vocab_size: int, seq_len: int) -> int:
    """Training FLOPs per token of a preset."""
    return llama(preset, vocab_size).flops_per_token(seq_len)
