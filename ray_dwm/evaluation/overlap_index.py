"""The n-grams of words of some items, and which of these have one that is in a text.

Legend: n = words of an n-gram; w = words of a text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 13
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class _Numbers(dict[str, int]):
    """A number from 1 on for each word, in the order in which they come."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self) + 1
        return number


class Index:
    """The n-grams of some sets of items, to be looked up in texts."""

    def __init__(self, sets: Mapping[str, Sequence[str]], words: int = WORDS) -> None:
        self._n, self._numbers = words, _Numbers()
        self.items = {name: len(texts) for name, texts in sets.items()}
        hashes, owners = [], []
        self._names, self._starts = list(sets), np.cumsum([0, *self.items.values()])
        for place, text in enumerate(text for texts in sets.values() for text in texts):
            found = _hashes(np.array([self._numbers[word] for word in _split(text)], dtype=np.uint64), words)
            hashes.append(found)
            owners.append(np.full(len(found), place))
        all_hashes = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(all_hashes, kind="stable")
        self._owners = np.concatenate(owners)[order] if owners else np.empty(0, np.int64)
        self._hashes, self._first = np.unique(all_hashes[order], return_index=True)
        self._last = np.append(self._first[1:], len(order))

    @property
    def judged(self) -> dict[str, int]:
        """Name of each set -> items that have an n-gram."""
        return self._by_set(np.unique(self._owners))

    def places(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Which items, counted through all sets, have an n-gram that is in some text; as many texts as memory holds."""
        found = np.flatnonzero(np.isin(self._hashes, _hashes(self._looked_up(texts), self._n)))
        owners = [self._owners[self._first[place] : self._last[place]] for place in found]
        return np.unique(np.concatenate([np.empty(0, np.int64), *owners]))

    def overlapping(self, places: Iterable[NDArray[np.int64]]) -> dict[str, int]:
        """Name of each set -> items of it that are among the places of any block of texts."""
        return self._by_set(np.unique(np.concatenate([np.empty(0, np.int64), *places])))

    def _looked_up(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """The numbers of all words, 0 for those that are in no item, and 0 between two texts."""
        get = self._numbers.get
        numbers: list[int] = []
        for text in texts:
            numbers.extend(get(word, 0) for word in _split(text))
            numbers.append(0)
        return np.array(numbers, dtype=np.uint64)

    def _by_set(self, places: NDArray[np.int64]) -> dict[str, int]:
        counts, _ = np.histogram(places, bins=[*self._starts]) if len(places) else (np.zeros(len(self._names), int), 0)
        return {name: int(count) for name, count in zip(self._names, counts, strict=True)}


def _split(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _hashes(numbers_w: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of n words that are all known, in order."""
    if len(numbers_w) < n:
        return np.empty(0, np.uint64)
    starts = np.flatnonzero(np.convolve(numbers_w > 0, np.ones(n, dtype=np.int64), mode="valid") == n)
    total = np.zeros(len(starts), dtype=np.uint64)
    for k in range(n):
        total = (total * _FACTOR) ^ _mixed(numbers_w[starts + k])
    return total


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers spread over 64 bits, by the last steps of splitmix64 (Steele et al. 2014)."""
    z = numbers * _FACTOR
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
