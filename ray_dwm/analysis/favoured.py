"""What a weighting preferred, phase by phase: weights joined back to texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import ShardReader
from ray_dwm.data.tokenization import FOLDER, Tokenizer

_TEXT_CHARACTERS = 280
PHASES = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence and its relative weight (1 is uniform) in a phase."""

    weight: float
    domain: str
    loss: float
    text: str


@dataclass(frozen=True, slots=True)
class Phase:
    """The sequences that a third of training favoured most and least."""

    name: str
    first_step: int
    last_step: int
    most: list[Sample]
    least: list[Sample]


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


def phases(weights: pa.Table, texts: Texts, count: int = 4) -> list[Phase]:
    """The extremes of each third of the weighted steps; steps before the first DWM version count as early.

    Args:
        weights: rows of weights/*.parquet.
        count: sequences on either side, at most half of them from one domain.
    """
    steps = weights.column("step").to_numpy()
    edges = np.linspace(steps.min(), steps.max() + 1, num=len(PHASES) + 1).astype(int)
    result = []
    for name, first, stop in zip(PHASES, edges[:-1], edges[1:], strict=True):
        part = weights.filter(pc.and_(pc.greater_equal(weights["step"], first), pc.less(weights["step"], stop)))
        order = np.argsort(part.column("weight").to_numpy(), kind="stable")
        ends = [_samples(part, chosen, texts, count) for chosen in (order[::-1], order)]
        result.append(Phase(name, int(first), int(stop) - 1, *ends))
    return result


def _samples(part: pa.Table, order: np.ndarray, texts: Texts, count: int) -> list[Sample]:
    samples: list[Sample] = []
    for index in order.tolist():
        record = part.slice(index, 1).to_pylist()[0]
        if sum(sample.domain == record["domain"] for sample in samples) >= (count + 1) // 2:
            continue
        samples.append(Sample(record["weight"], record["domain"], record["loss"], texts[record["sample_id"]]))
        if len(samples) == count:
            break
    return samples
