"""Hashed uni- and bigrams of texts or of token ids."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.records import read_arrays, save_arrays
from ray_dwm.data.shards import Rows
from ray_dwm.data.tokenization import FOLDER, Tokenizer

_WORDS = re.compile(r"\w+|[^\w\s]+")
"""Words and runs of punctuation, as DSIR's published code splits a text (NLTK's WordPunctTokenizer)."""
_KNOWN = 4_000_000


@dataclass(frozen=True, slots=True)
class Ngrams:
    """The n-grams of n rows, k of them together, with repetitions: order by order, and there row by row."""

    buckets_k: NDArray[np.integer]
    counts_on: NDArray[np.integer]
    """How many of each order, 1 and perhaps 2, each row has, (orders, n)."""

    @property
    def rows_k(self) -> NDArray[np.int64]:
        """The row, from 0 to n - 1, of each."""
        orders, n = self.counts_on.shape
        return np.repeat(np.tile(np.arange(n), orders), self.counts_on.ravel())


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(f"{folder}/{FOLDER}")


class _Numbers(dict[Any, int]):
    """A number for each key, in the order in which they come; one look-up where most of them have come before."""

    def __missing__(self, key: Any) -> int:
        number = self[key] = len(self)
        return number

    def since(self, count: int) -> list[Any]:
        """The keys that have come since there were so many."""
        return list(islice(reversed(self), len(self) - count))[::-1]


class WordHashes:
    """Buckets of words and of pairs of neighbours; what has been hashed is kept, for most of it comes again.

    sha256 is wasteful for this, but it is what the published bag models are made with.
    """

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets
        self._forget()

    def _forget(self) -> None:
        self._words, self._pairs = _Numbers(), _Numbers()
        self._spelt: list[str] = []
        self._of_words = np.empty(0, dtype=np.int64)
        self._of_pairs = np.empty(0, dtype=np.int64)

    def _hashed(self, ngrams: list[str]) -> NDArray[np.int64]:
        """sha256 modulo the number of buckets, word by word of 32 bits, the highest first."""
        sha256 = hashlib.sha256
        digests = b"".join([sha256(ngram.encode()).digest() for ngram in ngrams])
        rest, size = np.zeros(len(ngrams), dtype=np.uint64), np.uint64(self._buckets)
        for word in np.frombuffer(digests, dtype=">u4").reshape(-1, 8).T:
            rest = ((rest << np.uint64(32)) | word) % size
        return rest.view(np.int64)

    def __call__(self, texts: list[str], bigrams: bool) -> Ngrams:
        """The n-grams of some texts, in lower case."""
        if len(self._words) + len(self._pairs) > _KNOWN:
            self._forget()
        split = [_WORDS.findall(text.lower()) for text in texts]
        counts_n = np.array([len(words) for words in split], dtype=np.int64)
        words = chain.from_iterable(split)
        numbers_k = np.fromiter(map(self._words.__getitem__, words), np.int64, counts_n.sum())
        new = self._words.since(len(self._spelt))
        self._spelt += new
        self._of_words = np.concatenate([self._of_words, self._hashed(new)])
        buckets_k = self._of_words[numbers_k]
        if not bigrams:
            return Ngrams(buckets_k, counts_n[None])
        rows_k = np.repeat(np.arange(len(texts)), counts_n)
        pairs_p = ((numbers_k[:-1] << 32) | numbers_k[1:])[rows_k[:-1] == rows_k[1:]]
        counts_on = np.stack([counts_n, np.maximum(counts_n - 1, 0)])
        return Ngrams(np.concatenate([buckets_k, self._pair_buckets(pairs_p)]), counts_on)

    def _pair_buckets(self, pairs_p: NDArray[np.int64]) -> NDArray[np.int64]:
        # Each pair once: looking up and hashing costs more than sorting.
        unique_u, places_p = np.unique(pairs_p, return_inverse=True)
        numbers_u = np.fromiter(map(self._pairs.__getitem__, unique_u.tolist()), np.int64, len(unique_u))
        new, spelt = self._pairs.since(len(self._of_pairs)), self._spelt
        hashed = self._hashed([f"{spelt[pair >> 32]} {spelt[pair & 0xFFFFFFFF]}" for pair in new])
        self._of_pairs = np.concatenate([self._of_pairs, hashed])
        return self._of_pairs[numbers_u][places_p]


@lru_cache(maxsize=2)
def _hashes(buckets: int) -> WordHashes:
    return WordHashes(buckets)


def token_ngrams(ids_nT: NDArray[np.integer], bigrams: bool, buckets: int) -> Ngrams:
    """The n-grams of token ids, by a multiplicative hash."""
    ids = ids_nT.astype(np.uint64)
    one = np.uint64(1)  # without which a pair that begins with token 0 were the second token alone
    keys = [ids, (ids[:, :-1] + one) * np.uint64(0x100000001B3) + ids[:, 1:]][: 1 + bigrams]
    flat = np.concatenate([x.ravel() for x in keys])
    flat ^= flat >> np.uint64(31)
    flat *= np.uint64(0x7FB5D329728EA185)
    flat >>= np.uint64(16)
    counts_on = np.repeat([[x.shape[1]] for x in keys], len(ids), axis=1)
    return Ngrams((flat % np.uint64(buckets)).view(np.int64), counts_on)


def ngrams(rows: Rows, folder: str, kind: str, bigrams: bool, buckets: int, kept: str = "") -> Ngrams:
    """n-grams of rows of shards.

    Args:
        folder: the shards', whose tokenizer decodes them.
        kind: `text` or `tokens`.
        kept: a folder where those of words lie from the first time on, about 3 bytes for each token; empty: none.
            Token ids are hashed as fast as buckets are read.
    """
    if kind == "tokens":
        return token_ngrams(rows.input_ids, bigrams, buckets)
    path = Path(kept, f"ngrams-{hashlib.sha256(rows.sample_ids.tobytes()).hexdigest()[:16]}.npz")
    if kept and path.exists():
        arrays = read_arrays(path)
        return Ngrams(arrays["buckets"], arrays["counts"])
    found = _hashes(buckets)(_tokenizer(folder).decode_all(rows.input_ids), bigrams)
    if kept:
        narrow = np.min_scalar_type(buckets - 1)
        save_arrays(path, {"buckets": found.buckets_k.astype(narrow), "counts": found.counts_on.astype(np.uint32)})
    return found
