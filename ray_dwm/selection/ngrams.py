"""Hashed uni- and bigrams of texts or of token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.shards import Rows
from ray_dwm.data.tokenization import FOLDER, Tokenizer

_WORDS = re.compile(r"\w+|[^\w\s]+")
"""Words and runs of punctuation, as DSIR's published code splits a text (NLTK's WordPunctTokenizer)."""
_KNOWN = 4_000_000


@dataclass(frozen=True, slots=True)
class Ngrams:
    """The n-grams of n rows, k of them together, with repetitions."""

    buckets_k: NDArray[np.int64]
    rows_k: NDArray[np.int64]
    """The row, from 0 to n - 1, of each."""


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(f"{folder}/{FOLDER}")


class WordHashes:
    """Buckets of words and of pairs of neighbours; what has been hashed is kept, for most of it comes again.

    sha256 is wasteful for this, but it is what the published bag models are made with.
    """

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets
        self._forget()

    def _forget(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []
        self._of_words = np.empty(0, dtype=np.int64)
        self._of_pairs: dict[int, int] = {}

    def _buckets_of(self, ngrams: list[str]) -> NDArray[np.int64]:
        """sha256 modulo the number of buckets, word by word of 32 bits, the highest first."""
        sha256 = hashlib.sha256
        digests = b"".join([sha256(ngram.encode()).digest() for ngram in ngrams])
        rest, size = np.zeros(len(ngrams), dtype=np.uint64), np.uint64(self._buckets)
        for word in np.frombuffer(digests, dtype=">u4").reshape(-1, 8).T:
            rest = ((rest << np.uint64(32)) | word) % size
        return rest.view(np.int64)

    def _learn(self, words: Iterable[str]) -> None:
        new = list(dict.fromkeys(words))
        self._ids.update(zip(new, range(len(self._words), len(self._words) + len(new)), strict=True))
        self._words += new
        self._of_words = np.concatenate([self._of_words, self._buckets_of(new)])

    def __call__(self, texts: list[str], bigrams: bool) -> Ngrams:
        """The n-grams of some texts, in lower case."""
        if len(self._words) + len(self._of_pairs) > _KNOWN:
            self._forget()
        split = [_WORDS.findall(text.lower()) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(words) for words in split])
        words, get = list(chain.from_iterable(split)), self._ids.get
        ids = [get(word, -1) for word in words]
        if -1 in ids:
            self._learn(word for word, number in zip(words, ids, strict=True) if number < 0)
            ids = [get(word, -1) for word in words]
        ids_k = np.array(ids, dtype=np.int64)
        buckets_k = self._of_words[ids_k]
        if not bigrams:
            return Ngrams(buckets_k, rows)
        inside = rows[:-1] == rows[1:]
        pairs_p = ((ids_k[:-1] << 32) | ids_k[1:])[inside]
        return Ngrams(
            np.concatenate([buckets_k, self._pair_buckets(pairs_p)]), np.concatenate([rows, rows[:-1][inside]])
        )

    def _pair_buckets(self, pairs_p: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each pair once: looking up and hashing costs more than sorting."""
        unique_u, places_p = np.unique(pairs_p, return_inverse=True)
        unique, known, words = unique_u.tolist(), self._of_pairs, self._words
        found = [known.get(pair, -1) for pair in unique]
        if -1 in found:
            new = [pair for pair, bucket in zip(unique, found, strict=True) if bucket < 0]
            ngrams = [f"{words[pair >> 32]} {words[pair & 0xFFFFFFFF]}" for pair in new]
            known.update(zip(new, self._buckets_of(ngrams).tolist(), strict=True))
            found = [known[pair] for pair in unique]
        return np.array(found, dtype=np.int64)[places_p]


@lru_cache(maxsize=2)
def _hashes(buckets: int) -> WordHashes:
    return WordHashes(buckets)


def token_ngrams(ids_nT: NDArray[np.integer], bigrams: bool, buckets: int) -> Ngrams:
    """The n-grams of token ids, by a multiplicative hash."""
    ids = ids_nT.astype(np.uint64)
    keys = [ids, ids[:, :-1] * np.uint64(0x100000001B3) + ids[:, 1:] + np.uint64(1)][: 1 + bigrams]
    rows = [np.repeat(np.arange(len(x)), x.shape[1]) for x in keys]
    flat = np.concatenate([x.ravel() for x in keys])
    flat ^= flat >> np.uint64(31)
    flat *= np.uint64(0x7FB5D329728EA185)
    flat >>= np.uint64(16)
    return Ngrams((flat % np.uint64(buckets)).view(np.int64), np.concatenate(rows))


def ngrams(rows: Rows, folder: str, kind: str, bigrams: bool, buckets: int) -> Ngrams:
    """n-grams of rows of shards.

    Args:
        folder: the shards', whose tokenizer decodes them.
        kind: `text` or `tokens`.
    """
    if kind == "tokens":
        return token_ngrams(rows.input_ids, bigrams, buckets)
    return _hashes(buckets)(_tokenizer(folder).decode_all(rows.input_ids), bigrams)
