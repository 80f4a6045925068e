"""The LM: a transformers Llama built from a preset.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ray_dwm.core.accounting import Llama
from ray_dwm.core.losses import cross_entropy, entropy, next_tokens
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
        num_key_value_heads=shape.heads_of_keys,
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


class LmOutput(NamedTuple):
    """What a forward finds out about b sequences; a tuple, because FSDP looks for the tensors in it."""

    losses_bT: Tensor
    """Cross-entropy of every next token in nats, (b, T-1)."""
    entropies_bT: Tensor | None
    """Entropy of every prediction in nats, detached, (b, T-1), where it was asked for."""
    embeddings_bd: Tensor
    """The last token's last hidden state, detached, (b, d)."""


class Lm(LlamaForCausalLM):
    """A Llama whose forward ends in losses: logits are only ever there for `loss_chunk` tokens at a time.

    In 2048 x 32000 logits of a sequence there are as many numbers as in all else that its backward needs. So the head
    and the loss are taken chunk by chunk along the sequence, and once more in the backward.
    """

    def __init__(self, config: LlamaConfig, loss_chunk: int = 0) -> None:
        super().__init__(config)
        self.loss_chunk = loss_chunk
        """Tokens of all sequences together; 0: all at once, which keeps the logits for the backward."""
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
        """`core.losses.cross_entropy`, or that compiled."""

    def chunk(self, sequences: int, tokens: int) -> int:
        """Tokens of each of so many sequences whose logits are there at a time."""
        return min(tokens, max(1, self.loss_chunk // sequences)) if self.loss_chunk else tokens

    def forward(self, input_ids: Tensor, entropies: bool = False) -> LmOutput:  # type: ignore[override]
        """Losses of (b, T) token ids."""
        hidden_bTd = self.model(input_ids=input_ids).last_hidden_state
        size = self.chunk(*input_ids.shape)
        parts = []
        for hidden_bCd, targets_bC in zip(
            hidden_bTd.split(size, dim=1), next_tokens(input_ids).split(size, dim=1), strict=True
        ):
            if size < input_ids.shape[1] and torch.is_grad_enabled():
                arguments = (hidden_bCd, targets_bC, entropies)
                parts.append(checkpoint(self._part, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._part(hidden_bCd, targets_bC, entropies))
        losses, found = zip(*parts, strict=True)
        entropies_bT = torch.cat(found, dim=1)[:, :-1] if entropies else None
        # A copy, for FSDP hangs its backward onto what the root returns, and a view could lose it.
        return LmOutput(torch.cat(losses, dim=1)[:, :-1].clone(), entropies_bT, hidden_bTd[:, -1].detach())

    def _part(self, hidden_bCd: Tensor, targets_bC: Tensor, entropies: bool) -> tuple[Tensor, Tensor | None]:
        logits_bCV = self.lm_head(hidden_bCd)
        return self.cross_entropy(logits_bCV, targets_bC), entropy(logits_bCV.detach()) if entropies else None


def build_lm(config: LlamaConfig, seed: int, loss_chunk: int = 0) -> Lm:
    """A freshly initialised LM in fp32, whole and on the host: what `engine.materialize` gives the parts of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = Lm(config, loss_chunk)
    lm.float()
    return lm


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
