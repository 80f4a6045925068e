"""Token ids back to text: as the tokenizers library decodes them, whatever kind of tokenizer it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from ray_dwm.data.tokenization import Tokenizer

CORPUS = Path(__file__).parents[2] / "corpus" / "tokenizer"


def pieces(folder: Path) -> Path:
    """A tokenizer of words and single bytes, as Llama's, with a token that was added later."""
    words = ["<eos>", "▁a", "b", "▁<", "<0xC3>", "<0xA9>", "é"]
    backend = Backend(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("<tab>", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    return folder


def bytes_and_more(folder: Path) -> Path:
    """The bundled byte-level tokenizer with tokens that are no string of bytes."""
    hf = PreTrainedTokenizerFast(
        tokenizer_file=str(CORPUS / "tokenizer.json"), eos_token=Tokenizer(CORPUS)._hf.eos_token
    )
    hf.add_tokens(["<tab\t>", "日本", "Ġé "])
    hf.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [pieces, bytes_and_more])
def test_any_ids_are_decoded_as_the_library_does(kind: object, tmp_path: Path) -> None:
    tokenizer = Tokenizer(kind(tmp_path / "tokenizer"))  # type: ignore[operator]
    assert (tokenizer._bytes is None) == (kind is pieces)
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (500, 40))
    ids[:, ::7] = tokenizer.vocab_size - 1 - np.arange(6) % 3
    backend, eos = tokenizer._hf.backend_tokenizer, tokenizer._hf.eos_token
    expected = [text.replace(eos, "\n") for text in backend.decode_batch(ids.tolist(), skip_special_tokens=False)]
    assert tokenizer.decode_all(ids) == expected
    assert any("\ufffd" in text for text in expected) and any("\n" in text for text in expected)
