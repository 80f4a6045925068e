"""Folders that other programs load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_dwm.core.losses import token_losses
from ray_dwm.errors import DataError
from ray_dwm.models.dwm import build_dwm, dwm_shape
from ray_dwm.models.folders import load_dwm, save_dwm
from ray_dwm.models.hf import save_lm
from ray_dwm.models.lm import build_lm, lm_config


@pytest.mark.parametrize("preset", ["tiny", "quickstart"])
def test_exported_lm_has_equal_logits_in_transformers(tmp_path: Path, preset: str) -> None:
    config = lm_config(preset, vocab_size=64, seq_len=16, eos_token_id=0)
    model = build_lm(config, seed=3).eval()
    facts = {"config_yaml": "name: x\n", "name": "x", "tokens": 128, "steps": 8, "weighting": "DWM"}
    save_lm(tmp_path / "hf", config, model.state_dict(), **facts)  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(token_losses(loaded(input_ids=ids).logits, ids), model(ids).losses_bT)
    assert "128 tokens (8 steps)" in (tmp_path / "hf" / "README.md").read_text()
    assert not list((tmp_path / "hf").glob("*.bin"))


def saved_dwm(folder: Path) -> torch.nn.Module:
    model = build_dwm(dwm_shape("xs", 64, lm_features=True), seed=1)
    save_dwm(folder, model.shape, model.state_dict(), {"tokenizer_sha256": "a" * 64, "version": 4})
    return model


def test_dwm_survives_a_round_trip(tmp_path: Path) -> None:
    model = saved_dwm(tmp_path / "dwm")
    loaded, config = load_dwm(tmp_path / "dwm", "a" * 64)
    assert config["version"] == 4
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_dwm_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved_dwm(tmp_path / "dwm")
    with pytest.raises(DataError, match="learnt with another tokenizer"):
        load_dwm(tmp_path / "dwm", "b" * 64)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "model.safetensors").write_bytes(b"junk"),
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"width": 32', '"width": 64')),
    ],
    ids=["missing", "no JSON", "no shape", "no tensors", "another shape"],
)
def test_damaged_dwm_is_one_line(tmp_path: Path, spoil: object) -> None:
    saved_dwm(tmp_path / "dwm")
    spoil(tmp_path / "dwm")  # type: ignore[operator]
    with pytest.raises(DataError, match="not a readable DWM folder") as raised:
        load_dwm(tmp_path / "dwm")
    assert "\n" not in str(raised.value)
