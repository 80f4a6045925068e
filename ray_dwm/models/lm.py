"""The LM: a transformers Llama built from a preset, whose forward ends in losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ray_dwm.core.losses import cross_entropy, entropy, next_tokens
from ray_dwm.models.presets import lm_shape


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
