"""Parameters, FLOPs and utilisation by counting."""

from __future__ import annotations


def llama_parameters(
    *, vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool
) -> int:
    """Number of parameters of a Llama: embedding, attention (q, k, v, o), gated MLP, RMSNorms, output head."""
    head = width // heads
    attention = 2 * width * width + 2 * width * kv_heads * head
    block = attention + 3 * width * mlp_width + 2 * width
    return vocab * width * (1 if tied else 2) + layers * block + width


def train_flops_per_token(*, parameters: int, embedding_parameters: int, layers: int, width: int, seq_len: int) -> int:
    """Forward plus backward FLOPs per token: 6 N + 12 L d T (Chowdhery et al. 2022, PaLM, appendix B).

    N leaves out the input embedding, which is a look-up.
    """
    return 6 * (parameters - embedding_parameters) + 12 * layers * width * seq_len


def mfu(tokens_per_s: float, flops_per_token: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: achieved over peak."""
    return tokens_per_s * flops_per_token / peak_flops
