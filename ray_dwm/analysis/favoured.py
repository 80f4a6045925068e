"""The texts that a weighting favoured most and least, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_dwm.analysis.phases import Batches, Span, inside
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import ShardReader
from ray_dwm.data.tokenization import FOLDER, Tokenizer

_TEXT_CHARACTERS = 280


@dataclass(frozen=True, slots=True)
class Favoured:
    """One sequence and its relative weight (1 is uniform) in a phase."""

    sample_id: int
    weight: float
    domain: str
    loss: float
    text: str


@dataclass(frozen=True, slots=True)
class Extremes:
    """The sequences that a phase of training favoured most and least."""

    name: str
    first_step: int
    last_step: int
    most: list[Favoured]
    least: list[Favoured]


class Texts:
    """Looks up the beginning of a sequence's text by its sample id."""

    def __init__(self, shards: str) -> None:
        self._reader = ShardReader(load_manifest(shards))
        self._ids = self._reader.sample_ids()
        folder = self._reader.manifest.folder / FOLDER
        self._tokenizer = Tokenizer(folder) if folder.is_dir() else None

    def __getitem__(self, sample_id: int) -> str:
        if self._tokenizer is None:
            return "(the shards hold no tokenizer)"
        rows = self._reader.take(np.flatnonzero(self._ids == sample_id)[:1])
        return " ".join(self._tokenizer.decode(rows.input_ids[0].tolist()).split())[:_TEXT_CHARACTERS]


def extremes(batches: Batches, phases: list[Span], texts: Texts, count: int = 4) -> list[Extremes]:
    """The extremes of each phase.

    Args:
        count: sequences on either side, at most half of them from one domain.
    """
    result = []
    for phase in phases:
        part = batches.take(inside(batches, phase))
        order = np.argsort(part.weights_SB, axis=None, kind="stable")
        ends = [_favoured(part, chosen, texts, count) for chosen in (order[::-1], order)]
        result.append(Extremes(phase.name, phase.first_step, phase.last_step, *ends))
    return result


def _favoured(part: Batches, order: NDArray[np.int64], texts: Texts, count: int) -> list[Favoured]:
    found: list[Favoured] = []
    for index in order.tolist():
        place = np.unravel_index(index, part.ids_SB.shape)
        domain, sample_id = part.names[part.domains_SB[place]], int(part.ids_SB[place])
        if sum(one.domain == domain for one in found) >= (count + 1) // 2:
            continue
        weight, loss = float(part.weights_SB[place]), float(part.losses_SB[place])
        found.append(Favoured(sample_id, weight, domain, loss, texts[sample_id]))
        if len(found) == count:
            break
    return found
