"""What a Llama's forward leaves for its backward: the formula against what autograd is given, to the byte."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from ray_dwm.core import activations as act
from ray_dwm.core.accounting import Llama
from ray_dwm.models.lm import Lm

SEQUENCES, TOKENS, VOCAB = 3, 32, 100
TOTAL_WEIGHT = 4
"""The loss also keeps one fp32 number, the sum of its weights."""


def shape(layers: int, kv_heads: int) -> Llama:
    return Llama(vocab=VOCAB, width=64, layers=layers, heads=8, kv_heads=kv_heads, mlp_width=176, tied=False)


def build(llama: Llama, dtype: torch.dtype) -> Lm:
    config = LlamaConfig(
        vocab_size=llama.vocab,
        hidden_size=llama.width,
        intermediate_size=llama.mlp_width,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=llama.tied,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return Lm(config).to(dtype)


def saved_bytes(model: Lm) -> int:
    """Of all storages that autograd saves in a forward, each counted once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []  # a storage that is freed could give its address to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(tensor)
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randint(0, VOCAB, (SEQUENCES, TOKENS)))
    return sum(seen.values())


@pytest.mark.parametrize(("dtype", "e"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_forward_saves_what_the_table_says(dtype: torch.dtype, e: int, kv_heads: int, layers: int) -> None:
    llama = shape(layers, kv_heads)
    per_token = layers * act.block_saved(llama, e) + act.tail_saved(llama, e) + 4 * VOCAB
    expected = SEQUENCES * TOKENS * per_token + act.tables(llama, e, TOKENS)
    assert saved_bytes(build(llama, dtype)) == expected + TOTAL_WEIGHT


def test_a_block_of_1_3b_by_hand() -> None:
    """bf16, per token: 16 KiB of fp32 norms' inputs, 2 numbers, 6 x 2048, 2 x 2048, 4 x 5504 in bf16, 16 heads."""
    llama = Llama(vocab=32_000, width=2048, layers=24, heads=16, kv_heads=16, mlp_width=5504, tied=False)
    by_hand = 2 * 4 * 2048 + 2 * 4 + 2 * (6 * 2048 + 2 * 2048 + 4 * 5504) + 4 * 16
    assert act.block_saved(llama, 2) == by_hand == 93_256
    assert act.block_kept(llama, 2, "full") == 2 * 2048
    products = 2048 + 2 * 2048 + 2048 + 2 * 5504 + 2048
    assert act.block_kept(llama, 2, "selective") == 2 * (2048 + products + 2048) + 4 * 16


@pytest.mark.parametrize("e", [2, 4])
@pytest.mark.parametrize("kv_heads", [8, 1])
def test_recomputing_more_keeps_less(e: int, kv_heads: int) -> None:
    llama = shape(4, kv_heads)
    none, selective, full = (act.block_kept(llama, e, mode) for mode in ("none", "selective", "full"))
    assert full < selective < none
    # Kept and computed again make up at least a whole block, and twice what both hold is counted once.
    for mode in ("selective", "full"):
        kept, again = act.block_kept(llama, e, mode), act.block_again(llama, e, mode)
        assert none <= kept + again <= none + kept
    assert act.block_again(llama, e, "none") == 0
