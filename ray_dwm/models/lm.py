"""The LM: a transformers Llama built from a preset.

| preset | width | layers | heads | MLP width | vocabulary | parameters |
|---|---|---|---|---|---|---|
| tiny | 32 | 2 | 2 | 64 | data's | tests |
| quickstart | 96 | 4 | 4 | 256 | data's (8192) | 1.23 M |
| 30m | 384 | 6 | 6 | 1024 | data's (8192) | 16.91 M (35.20 M at 32000) |
| 370m | 1024 | 24 | 16 | 2816 | 32000 | 373.9 M |
| 1.3b | 2048 | 24 | 16 | 5504 | 32000 | 1345.4 M |

370m and 1.3b follow the Llama shape at the sizes of the method's evaluation (arXiv 2507.16178, section 4,
names the sizes but not the shapes: widths, depths and tying are ours; 24 layers of 2048 are those of
GPT-3 XL and Pythia-1.4B, the MLP is 8/3 of the width rounded up to a multiple of 128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ray_dwm.core.accounting import llama_parameters, train_flops_per_token
from ray_dwm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LmShape:
    """Shape of a Llama; `tied` shares the input and output embedding."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    tied: bool


PRESETS = {
    "tiny": LmShape(width=32, layers=2, heads=2, mlp_width=64, tied=True),
    "quickstart": LmShape(width=96, layers=4, heads=4, mlp_width=256, tied=True),
    "30m": LmShape(width=384, layers=6, heads=6, mlp_width=1024, tied=False),
    "370m": LmShape(width=1024, layers=24, heads=16, mlp_width=2816, tied=False),
    "1.3b": LmShape(width=2048, layers=24, heads=16, mlp_width=5504, tied=False),
}


def lm_shape(preset: str) -> LmShape:
    """The shape of a preset.

    Raises:
        ConfigError: where there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"lm.preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def lm_config(
    preset: str, *, vocab_size: int, seq_len: int, eos_token_id: int | None = None, attention: str = "auto"
) -> LlamaConfig:
    """The transformers configuration of a preset."""
    shape = lm_shape(preset)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        use_cache=False,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        attn_implementation="eager" if attention == "eager" else "sdpa",
    )


def build_lm(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised LM in fp32; the same seed gives the same weights on every rank and device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def parameter_count(preset: str, vocab_size: int) -> int:
    """Parameters of a preset, by formula."""
    shape = lm_shape(preset)
    return llama_parameters(
        vocab=vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.heads,
        mlp_width=shape.mlp_width,
        tied=shape.tied,
    )


def flops_per_token(preset: str, vocab_size: int, seq_len: int) -> int:
    """Training FLOPs per token of a preset."""
    shape = lm_shape(preset)
    return train_flops_per_token(
        parameters=parameter_count(preset, vocab_size),
        embedding_parameters=0 if shape.tied else vocab_size * shape.width,
        layers=shape.layers,
        width=shape.width,
        seq_len=seq_len,
    )
