"""Losses whose value is known, per domain."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import VOCAB, make_shards

from ray_dwm.data.manifest import DomainStats, Manifest
from ray_dwm.data.shards import write_shard
from ray_dwm.errors import DataError, UserError
from ray_dwm.evaluation.perplexity import _result, evaluate, evaluate_folders, format_table, load_lm
from ray_dwm.models.lm import build_lm, lm_config


def uniform_lm(folder: Path, vocab: int = VOCAB) -> Path:
    """An LM whose logits are all 0: log V nats on every token."""
    model = build_lm(lm_config("tiny", vocab_size=vocab, seq_len=16), seed=0)
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    return folder


def test_an_lm_that_knows_nothing_loses_log_v(tmp_path: Path) -> None:
    make_shards(tmp_path / "mixed", good=20, noise=12)
    results = evaluate_folders(uniform_lm(tmp_path / "lm"), [tmp_path / "mixed"], batch=7)
    assert [(r.domain, r.tokens) for r in results] == [("all", 32 * 15), ("good", 20 * 15), ("noise", 12 * 15)]
    for result in results:
        assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert result.perplexity == pytest.approx(VOCAB, rel=1e-5)
        assert result.loss_error == pytest.approx(0.0, abs=1e-6)
        assert result.bits_per_byte == pytest.approx(math.log2(VOCAB), rel=1e-6)  # one byte a token


def test_bits_per_byte_and_mask_by_hand(tmp_path: Path) -> None:
    """Two of three predictions count, four bytes a token: log2(V) / 4 bits per byte."""
    folder = tmp_path / "set"
    folder.mkdir()
    mask = np.array([[True, False, True, True]])
    shard = write_shard(
        folder / "a.arrow",
        sample_ids=np.array([0]),
        domains=["d"],
        input_ids=np.array([[1, 2, 3, 4]]),
        vocab_size=VOCAB,
        loss_mask=mask,
    )
    Manifest(
        folder=folder,
        seq_len=4,
        vocab_size=VOCAB,
        eos_token_id=0,
        tokenizer_name="t",
        tokenizer_sha256="0",
        files=(shard,),
        domains={"d": DomainStats(rows=1, tokens=4, bytes_per_token=4.0)},
        made_by={},
    ).write()
    (result,) = evaluate(load_lm(uniform_lm(tmp_path / "lm")), folder)
    assert result.tokens == 2
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB) / 4)
    assert (result.loss_error, result.perplexity_error, result.bits_error) == (None, None, None)  # of one sequence
    assert format_table([result]).splitlines()[1].split().count("n/a") == 3


def test_standard_errors_by_hand() -> None:
    """Sequences of 1 and 3 nats over 2 tokens each: residuals of 1, so sqrt(2 / 1 * 2) / 4 = 0.5 nats per token."""
    nats, tokens = np.array([1.0, 3.0]), np.array([2, 2])
    result = _result("s", "all", nats, tokens, np.array([4.0, 4.0]))
    assert (result.loss, result.loss_error) == (1.0, pytest.approx(0.5))
    assert result.perplexity_error == pytest.approx(math.e / 2)
    assert (result.bits_per_byte, result.bits_error) == (
        pytest.approx(0.25 / math.log(2)),
        pytest.approx(0.125 / math.log(2)),
    )
    # Where bytes explain the losses, bits per byte are exact and nats per token are not.
    result = _result("s", "all", nats, tokens, np.array([1.0, 3.0]))
    assert result.bits_error == pytest.approx(0.0) and result.loss_error == pytest.approx(0.5)


def test_a_larger_vocabulary_than_the_lms_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "mixed", good=4, noise=4)
    with pytest.raises(DataError, match="prepare with the LM's tokenizer"):
        evaluate_folders(uniform_lm(tmp_path / "lm", vocab=32), [tmp_path / "mixed"])


def test_a_damaged_lm_is_one_line(tmp_path: Path) -> None:
    folder = uniform_lm(tmp_path / "lm")
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be loaded as an LM") as raised:
        load_lm(folder)
    assert "\n" not in str(raised.value)


def test_the_table_says_it(tmp_path: Path) -> None:
    make_shards(tmp_path / "mixed", good=4, noise=4)
    lines = format_table(evaluate_folders(uniform_lm(tmp_path / "lm"), [tmp_path / "mixed"])).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["all", "good", "noise"]
    assert all(f"{math.log(VOCAB):.4f}" in line for line in lines[1:])


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", good=4, noise=4, files=1)
    path = tmp_path / "set" / "part-0.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="differs from its checksum"):
        evaluate_folders(uniform_lm(tmp_path / "lm"), [tmp_path / "set"])


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", good=4, noise=4)
    folder = uniform_lm(tmp_path / "lm")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="was made with tokenizer synthetic"):
        evaluate_folders(folder, [tmp_path / "set"])


def test_code_beside_an_lm_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = uniform_lm(tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "x", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be loaded as an LM"):
        load_lm(folder)
    assert not (tmp_path / "mark").exists()
