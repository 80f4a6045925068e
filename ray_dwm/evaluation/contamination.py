"""Whether what an LM is judged by was there to be learnt by heart: n-grams of words that two sets share.

An item (of a task; a row of a target set) overlaps with a set of shards where any run of 13 words of it is in them, in
whatever case, punctuation and Unicode form: the rule of Brown et al. 2020 (arXiv 2005.14165, appendix C), and the
strict one, for most of what it marks is a quotation and not the item. All rows are looked at. Rows that were packed one
after the other are read as one text, up to the borders of the blocks that are read at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import DataConfig
from ray_dwm.data.manifest import MANIFEST, Manifest, file_sha256, load_manifest
from ray_dwm.data.records import digest
from ray_dwm.data.shards import ShardReader
from ray_dwm.data.tokenization import FOLDER, Tokenizer
from ray_dwm.errors import DataError, ResourceError
from ray_dwm.evaluation.overlap_index import WORDS, Index
from ray_dwm.logs import say

TRAINING = "the training set"
_BLOCK_ROWS = 2048
_BLOCKS_ALONE = 64
"""As many are read by this process; for more, one process a core is worth its start."""
_TELL_S = 30.0
"""Between two words about how far the reading is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How much of one set is in another."""

    what: str
    against: str
    items: int
    judged: int
    """Items with as many words as an n-gram; the others are too short to tell."""
    overlapping: int
    words: int
    """n."""
    of: str
    """Digest of both sets: where it is the same, so is the rest."""

    @property
    def share(self) -> float:
        """Of the judged items."""
        return self.overlapping / self.judged if self.judged else 0.0

    def __str__(self) -> str:
        short = f", {self.items - self.judged} are too short to tell" if self.judged < self.items else ""
        return (
            f"{self.overlapping} of {self.judged} items of {self.what} ({self.share:.2%}) share {self.words} words in "
            f"a row with {self.against}{short}"
        )


class _Reader:
    """Looks a folder of shards up in an index, block by block."""

    def __init__(self, index: Index, folder: Path) -> None:
        self._index, self._manifest = index, load_manifest(folder)
        self._reader, self._tokenizer = ShardReader(self._manifest), _tokenizer(self._manifest)

    def texts(self, start: int) -> list[str]:
        """The texts of a block from this row on; rows that follow each other are one."""
        rows = self._reader.take(np.arange(start, min(start + _BLOCK_ROWS, self._manifest.rows)))
        follows = (np.diff(rows.sample_ids) == 1) & (np.diff(rows.domains) == 0)
        texts = self._tokenizer.decode_all(rows.input_ids)
        cuts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(texts)]
        return ["".join(texts[first:last]) for first, last in pairwise(cuts)]

    def places(self, start: int) -> NDArray[np.int64]:
        """See Index.places."""
        return self._index.places(self.texts(start))


_reader: _Reader
"""Of a process that does nothing else; a pool hands it no other state."""


def _begin(index: Index, folder: Path) -> None:
    """The start of a process that reads."""
    global _reader
    _reader = _Reader(index, folder)


def _places(start: int) -> NDArray[np.int64]:
    return _reader.places(start)


def _read(index: Index, manifest: Manifest, place: str) -> dict[str, int]:
    """Name of each set -> items of it that overlap with a folder of shards; many are read by one process a core.

    Raises:
        ResourceError: a process was killed.
    """
    starts, reader = range(0, manifest.rows, _BLOCK_ROWS), _Reader(index, manifest.folder)
    if len(starts) <= _BLOCKS_ALONE:
        return index.overlapping(_told(map(reader.places, starts), len(starts), place))
    context = multiprocessing.get_context("forkserver")  # this process may have threads, as of Ray's
    with ProcessPoolExecutor(os.cpu_count(), context, _begin, (index, manifest.folder)) as pool:
        try:
            return index.overlapping(_told(pool.map(_places, starts, chunksize=8), len(starts), place))
        except BrokenProcessPool:
            raise ResourceError(
                f"a process that looked for overlaps with {place} was killed, or could not start: one for each of "
                f"{os.cpu_count()} cores must have room in memory"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _told(found: Iterable[NDArray[np.int64]], blocks: int, place: str) -> Iterator[NDArray[np.int64]]:
    """The same, and what takes long says how far it is."""
    start = told = time.monotonic()
    for number, places in enumerate(found, start=1):
        yield places
        now, read = time.monotonic(), number / blocks
        if now - told >= _TELL_S and read < 1:
            told, left = now, (now - start) * (1 / read - 1)
            say(f"looking for overlaps with {place}: {read:.0%} read, about {left / 60:.0f} minutes left")


def row_texts(manifest: Manifest) -> list[str]:
    """The text of each row of a folder of shards."""
    reader = ShardReader(manifest)
    return _tokenizer(manifest).decode_all(reader.take(np.arange(manifest.rows)).input_ids)


def _tokenizer(manifest: Manifest) -> Tokenizer:
    folder = manifest.folder / FOLDER
    if not folder.is_dir():
        raise DataError(
            f"{manifest.folder} has no tokenizer beside its shards, and so no words that could be compared: prepare it "
            "anew, or evaluate with --no-guard"
        )
    return Tokenizer(folder)


def overlaps(
    sets: Mapping[str, Sequence[str]], against: Mapping[str, Manifest], known: Iterable[Overlap] = ()
) -> list[Overlap]:
    """How much of each set of items is in each set of shards.

    Args:
        known: earlier findings; shards are only read for what is not among them.

    Raises:
        DataError: the shards have no tokenizer, or are damaged.
    """
    kept = {overlap.of: overlap for overlap in known}
    found: list[Overlap] = []
    for place, manifest in against.items():
        shards = file_sha256(manifest.folder / MANIFEST)
        of = {name: digest([WORDS, "NFKC", name, list(texts), place, shards]) for name, texts in sets.items()}
        new = {name: texts for name, texts in sets.items() if of[name] not in kept}
        if new:
            index = Index(new)
            hits, judged = _read(index, manifest, place), index.judged
            for name, texts in new.items():
                kept[of[name]] = Overlap(
                    what=name,
                    against=place,
                    items=len(texts),
                    judged=judged[name],
                    overlapping=hits[name],
                    words=WORDS,
                    of=of[name],
                )
        found += [kept[of[name]] for name in sets]
    return found


def guard(
    tasks: Mapping[str, Sequence[str]],
    train: str,
    targets: Mapping[str, str],
    known: Iterable[Overlap] = (),
) -> list[Overlap]:
    """Tasks against the training set and the target sets, and the target sets against the training set.

    Args:
        tasks: name -> texts of the items.
        train: folder of shards; empty: not known.
        targets: name -> folder of shards.
        known: see `overlaps`.
    """
    sets = {_target(name): load_manifest(folder) for name, folder in targets.items()}
    told, found = list(known), []
    if train:
        rows = {name: row_texts(of) for name, of in sets.items()}
        found = overlaps({**tasks, **rows}, {TRAINING: load_manifest(train)}, told)
    return found + overlaps(tasks, sets, told)


def compare_sets(data: DataConfig, known: Iterable[Overlap] = ()) -> list[Overlap]:
    """What a run is judged by without tasks: target and held-out sets against the training set, held-out sets against
    the target sets.

    Args:
        known: see `overlaps`.

    Raises:
        DataError: shards are not there, damaged, or have no tokenizer.
    """
    targets = {_target(name): load_manifest(folder) for name, folder in data.target_sets.items()}
    learnt = {name: row_texts(of) for name, of in targets.items()}
    held_out = {_held_out(name): row_texts(load_manifest(folder)) for name, folder in data.held_out.items()}
    told = list(known)
    found = overlaps({**learnt, **held_out}, {TRAINING: load_manifest(data.train)}, told)
    return found + overlaps(held_out, targets, told)


def set_pairs(data: DataConfig) -> set[tuple[str, str]]:
    """`what` and `against` of all that `compare_sets` finds."""
    targets, held_out = map(_target, data.target_sets), [*map(_held_out, data.held_out)]
    learnt = [TRAINING, *targets]
    return {(name, TRAINING) for name in learnt[1:]} | {(name, of) for name in held_out for of in learnt}


def _target(name: str) -> str:
    return "the target set" if name == "target" else f"target set {name}"


def _held_out(name: str) -> str:
    return f"held-out set {name}"


def refuse(found: Sequence[Overlap], most: float, key: str) -> None:
    """Refuse tasks and target sets that were there to be learnt by heart.

    Args:
        most: share of the items that may overlap.
        key: the option or configuration key that says so.

    Raises:
        DataError: naming the worst.
    """
    worst = max(found, key=lambda overlap: overlap.share, default=None)
    if worst is not None and worst.share > most:
        raise DataError(
            f"{worst}, more than {key} = {most:g} allows: take them out of one of the two, or raise it to know the "
            "scores all the same"
        )
