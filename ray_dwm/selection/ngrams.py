"""Hashed uni- and bigrams of texts or of token ids."""

from __future__ import annotations

import hashlib
import re
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
        self._of_words = np.empty(1024, dtype=np.int64)
        self._of_pairs: dict[int, int] = {}

    def _bucket(self, ngram: str) -> int:
        return int.from_bytes(hashlib.sha256(ngram.encode()).digest()) % self._buckets

    def _id(self, word: str) -> int:
        number = self._ids[word] = len(self._words)
        self._words.append(word)
        if number == len(self._of_words):
            self._of_words = np.concatenate([self._of_words, np.empty_like(self._of_words)])
        self._of_words[number] = self._bucket(word)
        return number

    def __call__(self, texts: list[str], bigrams: bool) -> Ngrams:
        """The n-grams of some texts, in lower case."""
        if len(self._words) + len(self._of_pairs) > _KNOWN:
            self._forget()
        split = [_WORDS.findall(text.lower()) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(words) for words in split])
        get, new = self._ids.get, self._id
        ids = [get(word, -1) for word in chain.from_iterable(split)]
        if -1 in ids:
            ids = [new(w) if (i := get(w, -1)) < 0 else i for w in chain.from_iterable(split)]
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
        known, words = self._of_pairs, self._words
        found = [known.get(pair, -1) for pair in unique_u.tolist()]
        for place, pair in zip(
            np.flatnonzero(np.array(found) < 0), unique_u[np.array(found) < 0].tolist(), strict=True
        ):
            found[place] = known[pair] = self._bucket(f"{words[pair >> 32]} {words[pair & 0xFFFFFFFF]}")
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
