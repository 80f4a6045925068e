"""Bytes that PyTorch keeps of a Llama's forward for its backward, term by term.

What the autograd nodes of transformers' Llama save; tests count the same with `saved_tensors_hooks`, to the byte.
Legend: e = bytes of a number in the compute dtype (2 or 4), d = width, k = width of the keys, m = MLP width,
h = heads, V = vocabulary. Everything is per token.

| tensor of a block | saved by | bytes |
|---|---|---|
| norm's input in fp32, twice | RMSNorm (its own dtype is fp32; where e = 4 it is the residual stream itself) | 2 * 4d |
| 1 / rms, twice | RMSNorm | 2 * 4 |
| normalised input, twice | RMSNorm's gain | 2 * ed |
| input of q, k, v and of gate, up | Linear | 2 * ed |
| rotated q, rotated k, v | attention | e (d + 2k) |
| attention's result (the input of o), log-sum-exp | attention | ed + 4h |
| gate, SiLU(gate), up, their product (the input of down) | SiLU, product, Linear | 4em |

Outside the blocks: the final norm (4d + 4 + ed), the head's input (ed), and of the loss the fp32 log-probabilities (4V).
The residual stream itself is saved by nobody where e = 2; RoPE's sines and cosines are shared by all sequences.
Attention is a fused kernel (flash, cuDNN, or the CPU's): it saves no scores.
"""

from __future__ import annotations

from typing import Literal

from ray_dwm.core.accounting import Llama

FP32 = 4
Checkpointing = Literal["none", "selective", "full"]


def block_saved(llama: Llama, e: int) -> int:
    """What a block keeps, without activation checkpointing: the table above."""
    d, k, m = llama.width, llama.kv_width, llama.mlp_width
    norms = 2 * FP32 * d + 2 * FP32 + 2 * e * d
    attention = e * d + e * (d + 2 * k) + e * d + FP32 * llama.heads
    mlp = e * d + 4 * e * m
    return norms + attention + mlp


def block_kept(llama: Llama, e: int, checkpointing: Checkpointing) -> int:
    """What a block keeps from its forward to its backward.

    full: its input. selective: also the results of all seven products and of the attention, with its log-sum-exp.
    """
    d, k, m = llama.width, llama.kv_width, llama.mlp_width
    if checkpointing == "none":
        return block_saved(llama, e)
    products = e * (d + 2 * k + d + 2 * m + d)
    return e * d + (products + e * d + FP32 * llama.heads if checkpointing == "selective" else 0)


def block_again(llama: Llama, e: int, checkpointing: Checkpointing) -> int:
    """What is there in a block's backward beyond `block_kept`: what was computed again.

    It shares v, gate, up and the attention's result with what `selective` kept, and in fp32 the block's input.
    """
    if checkpointing == "none":
        return 0
    d, k, m = llama.width, llama.kv_width, llama.mlp_width
    shared = e * d if e == FP32 else 0
    if checkpointing == "selective":
        shared += e * (k + 2 * m + d) + FP32 * llama.heads
    return block_saved(llama, e) - shared


def block_transient(llama: Llama, e: int) -> int:
    """The most that a block's backward holds besides: at the MLP's product, the gradients of both factors.

    That of the product itself has taken the place of the saved product. Beside them: the residual stream's gradient.
    """
    return 2 * e * llama.mlp_width + e * llama.width


def tail_saved(llama: Llama, e: int) -> int:
    """Of the final norm and the head's input, and two copies of the token ids."""
    return FP32 * llama.width + FP32 + 2 * e * llama.width + 16


def logits_forward(llama: Llama, e: int) -> int:
    """The loss's forward: logits, their fp32 copy where they are not fp32, log-probabilities."""
    return (e if e != FP32 else 0) * llama.vocab + 2 * FP32 * llama.vocab


def logits_backward(llama: Llama) -> int:
    """The loss's backward: log-probabilities, their gradient, the logits' gradient, all fp32."""
    return 3 * FP32 * llama.vocab


def head_backward(llama: Llama, e: int) -> int:
    """The head's backward, once the log-probabilities are gone: gradients of the logits and of the head's input."""
    return e * llama.vocab + e * llama.width


def tables(llama: Llama, e: int, seq_len: int) -> int:
    """RoPE's cosines and sines, for all sequences and blocks together."""
    return 2 * e * seq_len * (llama.width // llama.heads)
