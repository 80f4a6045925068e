"""Text to token ids with any Hugging Face tokenizer folder."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel

from ray_dwm.data.manifest import file_sha256
from ray_dwm.errors import DataError

FOLDER = "tokenizer"
"""Where a folder of shards keeps a copy of its tokenizer, so that texts and exported LMs need nothing else."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what makes up a tokenizer folder, where there is one."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


class Tokenizer:
    """A tokenizer folder, with what a manifest records of it."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder).expanduser().absolute()
        if not (path / "tokenizer.json").is_file():
            raise DataError(
                f"{path} holds no tokenizer.json: name a Hugging Face tokenizer folder in prepare.tokenizer"
            )
        from transformers import AutoTokenizer  # takes seconds, and prepared shards need none

        try:
            self._hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many kinds for a damaged folder
            raise DataError(
                f"tokenizer folder {path} cannot be loaded ({str(error).splitlines()[0]}): save it anew with "
                "`save_pretrained`"
            ) from None
        if self._hf.eos_token_id is None:
            raise DataError(
                f"tokenizer {path} has no end-of-sequence token: set eos_token in its tokenizer_config.json"
            )
        self.name = path.name
        self.sha256 = file_sha256(path / "tokenizer.json")
        self.eos_token_id = int(self._hf.eos_token_id)
        self.vocab_size = len(self._hf)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each document, closed by the end-of-sequence token; markers inside a text stay text."""
        encoded = self._hf(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [[*ids, self.eos_token_id] for ids in encoded["input_ids"]]

    def decode_all(self, ids_nT: NDArray[np.integer]) -> list[str]:
        """Texts of rows of token ids; a line break stands where a document ends."""
        if (table := self._bytes) is not None:
            get = table.__getitem__
            return [b"".join(map(get, ids)).decode(errors="replace") for ids in ids_nT.tolist()]
        texts = self._hf.backend_tokenizer.decode_batch(ids_nT.tolist(), skip_special_tokens=False)
        return [text.replace(self._hf.eos_token, "\n") for text in texts]

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """What each token id stands for, where a token is a string of bytes: joining them is three times as fast."""
        backend = self._hf.backend_tokenizer
        if not isinstance(backend.decoder, ByteLevel):
            return None
        byte_of = _byte_of_character()
        tokens = (backend.id_to_token(number) or "" for number in range(self.vocab_size))
        table = [
            bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode() for token in tokens
        ]
        table[self.eos_token_id] = b"\n"
        return table

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self._hf.decode(ids))


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes bytes as characters: printable Latin-1 as it is, all others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(shown))
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
