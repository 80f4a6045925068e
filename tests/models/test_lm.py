"""Presets: parameter counts as stated, and a real step of the 370m one."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from ray_dwm.core.losses import token_losses
from ray_dwm.errors import ConfigError
from ray_dwm.models.lm import build_lm, lm_config
from ray_dwm.models.presets import PRESETS, flops_per_token, parameter_count

# Multiplied out by hand from width, layers, MLP width and vocabulary (see the table in models/lm.py).
STATED = {
    ("quickstart", 8192): 1_229_664,
    ("5m", 8192): 5_115_072,
    ("370m", 32_000): 373_867_520,
    ("1.3b", 32_000): 1_345_423_360,
    ("7b", 32_000): 6_738_415_616,
    ("13b", 32_000): 13_015_864_320,
    ("70b", 32_000): 68_976_648_192,
}


@pytest.mark.parametrize(("preset", "vocab"), STATED)
def test_presets_have_the_stated_size(preset: str, vocab: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(lm_config(preset, vocab_size=vocab, seq_len=2048))
    assert sum(p.numel() for p in model.parameters()) == STATED[preset, vocab]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_formula_counts_what_is_built(preset: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(lm_config(preset, vocab_size=777, seq_len=64))
    assert parameter_count(preset, 777) == sum(p.numel() for p in model.parameters())


def test_flops_of_the_370m_preset_by_hand() -> None:
    """6 (373.9 M - 32.8 M of look-up) + 12 * 24 * 1024 * 2048 = 2.651 GFLOPs a token."""
    assert flops_per_token("370m", 32_000, 2048) == 6 * (373_867_520 - 32_768_000) + 12 * 24 * 1024 * 2048


@pytest.mark.slow
def test_one_step_of_370m_on_the_cpu() -> None:
    model = build_lm(lm_config("370m", vocab_size=32_000, seq_len=16), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 32_000, (1, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        loss = model(ids).losses_bT.mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(10.37, abs=0.5)  # log(32000)
    assert losses[1] < losses[0]


def test_the_same_seed_gives_the_same_lm() -> None:
    config = lm_config("tiny", vocab_size=64, seq_len=16)
    left, right, other = (build_lm(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not torch.equal(left["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be one of tiny, quickstart, 5m, 30m, 370m, 1\.3b, 7b, 13b, 70b$"):
        lm_config("405b", vocab_size=10, seq_len=4)


@pytest.mark.parametrize(("loss_chunk", "chunk"), [(0, 13), (6, 2), (3, 1), (1, 1), (21, 7), (10**6, 13)])
def test_chunks_change_neither_losses_nor_gradients(loss_chunk: int, chunk: int) -> None:
    """Against the plain Llama of transformers on 3 x 13 tokens."""
    config = lm_config("tiny", vocab_size=64, seq_len=13)
    ids = torch.randint(0, 64, (3, 13), generator=torch.Generator().manual_seed(0))
    ours, plain = build_lm(config, 0, loss_chunk), LlamaForCausalLM(config)
    plain.load_state_dict(ours.state_dict())
    output, expected = ours(ids, entropies=True), plain(input_ids=ids, output_hidden_states=True)
    assert ours.chunk(*ids.shape) == chunk
    assert output.entropies_bT is not None
    torch.testing.assert_close(output.losses_bT, token_losses(expected.logits, ids))
    log_p = torch.log_softmax(expected.logits, dim=-1)[:, :-1]
    torch.testing.assert_close(output.entropies_bT, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(output.embeddings_bd, expected.hidden_states[-1][:, -1])
    weights = torch.tensor([0.5, 0.2, 0.3])
    torch.dot(weights, output.losses_bT.sum(1)).backward()
    torch.dot(weights, token_losses(expected.logits, ids).sum(1)).backward()
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=name)


def test_a_chunk_holds_its_logits_only() -> None:
    """What the backward is given: with chunks of 8 tokens no tensor of tokens x vocabulary, without them one."""
    ids = torch.randint(0, 512, (4, 16))
    for loss_chunk, found in ((8, False), (0, True)):
        lm, kept = build_lm(lm_config("tiny", vocab_size=512, seq_len=16), 0, loss_chunk), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            lm(ids)
        assert (max(kept) >= 4 * 16 * 512) == found
