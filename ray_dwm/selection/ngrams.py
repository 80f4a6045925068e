"""Hashed n-grams of texts or of token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.shards import Rows
from ray_dwm.data.tokenization import FOLDER, Tokenizer

_WORDS = re.compile(r"\w+|[^\w\s]+")
"""Words and runs of punctuation, as DSIR's published code splits a text (NLTK's WordPunctTokenizer)."""
_KNOWN = 2_000_000


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(f"{folder}/{FOLDER}")


class Buckets(dict[str, int]):
    """n-gram -> bucket; what has been hashed is kept, for most n-grams come again."""

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self._buckets = buckets

    def __missing__(self, ngram: str) -> int:
        if len(self) >= _KNOWN:
            self.clear()
        # sha256 is wasteful here, but the published bag models are made with it.
        bucket = int.from_bytes(hashlib.sha256(ngram.encode()).digest()) % self._buckets
        self[ngram] = bucket
        return bucket


@lru_cache(maxsize=2)
def known(buckets: int) -> Buckets:
    """This process's buckets."""
    return Buckets(buckets)


def text_buckets(text: str, ngrams: int, table: Buckets) -> list[int]:
    """Buckets of all 1- to n-grams of a text, in lower case."""
    words = _WORDS.findall(text.lower())
    found = [table[word] for word in words]
    for n in range(2, ngrams + 1):
        found += [table[" ".join(gram)] for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return found


def token_buckets(ids_nT: NDArray[np.integer], ngrams: int, buckets: int) -> NDArray[np.int64]:
    """Buckets of all 1- to n-grams of token ids, (n, T) -> (n, T + T-1 + ...)."""
    ids = ids_nT.astype(np.uint64)
    keys, columns = ids, [ids]
    with np.errstate(over="ignore"):
        for n in range(1, ngrams):
            keys = keys[:, :-1] * np.uint64(0x100000001B3) + ids[:, n:] + np.uint64(n)
            columns.append(keys)
        mixed = [(x ^ (x >> np.uint64(31))) * np.uint64(0x7FB5D329728EA185) >> np.uint64(16) for x in columns]
    return (np.concatenate(mixed, axis=1) % np.uint64(buckets)).astype(np.int64)


def features(rows: Rows, folder: str, kind: str, ngrams: int, buckets: int) -> Iterator[NDArray[np.int64]]:
    """Buckets of every row's n-grams, with repetitions.

    Args:
        folder: the shards' folder, whose tokenizer decodes them.
        kind: `text` or `tokens`.
    """
    if kind == "tokens":
        yield from token_buckets(rows.input_ids, ngrams, buckets)
        return
    table = known(buckets)
    for text in _tokenizer(folder).decode_all(rows.input_ids):
        yield np.array(text_buckets(text, ngrams, table), dtype=np.int64)
