"""Parameters, FLOPs and utilisation by counting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama:
    """Numbers that say what a Llama costs."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    tied: bool

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.width // self.heads * self.kv_heads

    @property
    def block_parameters(self) -> int:
        """Of one block: attention (q, k, v, o), gated MLP, two RMSNorms."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width
        return attention + 3 * self.width * self.mlp_width + 2 * self.width

    @property
    def root_parameters(self) -> int:
        """Of what is outside the blocks: embedding, final RMSNorm, output head."""
        return self.vocab * self.width * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block_parameters + self.root_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Forward plus backward FLOPs per token."""
        return train_flops_per_token(
            parameters=self.parameters,
            embedding_parameters=0 if self.tied else self.vocab * self.width,
            layers=self.layers,
            width=self.width,
            seq_len=seq_len,
        )


def train_flops_per_token(*, parameters: int, embedding_parameters: int, layers: int, width: int, seq_len: int) -> int:
    """Forward plus backward FLOPs per token: 6 N + 12 L d T (Chowdhery et al. 2022, PaLM, appendix B).

    N leaves out the input embedding, which is a look-up. Heads that share keys and values (GQA) make N smaller and
    leave the second term as it is: every query is compared with every key all the same.
    """
    return 6 * (parameters - embedding_parameters) + 12 * layers * width * seq_len


def mfu(tokens_per_s: float, flops_per_token: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: achieved over peak."""
    return tokens_per_s * flops_per_token / peak_flops
