"""What a DWM preferred, phase by phase: weights joined back to texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import ShardReader
from ray_dwm.data.tokenization import Tokenizer

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


def phases(weights: pa.Table, shards: str, tokenizer: str, count: int = 4) -> list[Phase]:
    """The extremes of each third of the weighted steps; steps before the first DWM version count as early.

    Args:
        weights: rows of weights/*.parquet.
        shards: the training set's folder.
        tokenizer: a tokenizer folder, for the texts; an empty name leaves them out.
        count: sequences on either side, at most one per domain and a half of them from one domain.
    """
    manifest = load_manifest(shards)
    reader = ShardReader(manifest)
    decoder = Tokenizer(tokenizer) if tokenizer else None
    row_of = _row_numbers(reader)
    steps = weights.column("step").to_numpy()
    edges = np.linspace(steps.min(), steps.max() + 1, num=len(PHASES) + 1).astype(int)
    result = []
    for name, first, stop in zip(PHASES, edges[:-1], edges[1:], strict=True):
        part = weights.filter(pc.and_(pc.greater_equal(weights["step"], first), pc.less(weights["step"], stop)))
        order = np.argsort(part.column("weight").to_numpy(), kind="stable")
        ends = [_samples(part, chosen, reader, row_of, decoder, count) for chosen in (order[::-1], order)]
        result.append(Phase(name, int(first), int(stop) - 1, *ends))
    return result


def _row_numbers(reader: ShardReader) -> dict[int, int]:
    rows = np.arange(reader.manifest.rows)
    return dict(zip(reader.take(rows).sample_ids.tolist(), rows.tolist(), strict=True))


def _samples(
    part: pa.Table,
    order: np.ndarray,
    reader: ShardReader,
    row_of: dict[int, int],
    decoder: Tokenizer | None,
    count: int,
) -> list[Sample]:
    samples: list[Sample] = []
    for index in order.tolist():
        record = part.slice(index, 1).to_pylist()[0]
        if sum(sample.domain == record["domain"] for sample in samples) >= (count + 1) // 2:
            continue
        rows = reader.take(np.array([row_of[record["sample_id"]]]))
        text = "" if decoder is None else " ".join(decoder.decode(rows.input_ids[0].tolist()).split())
        samples.append(Sample(record["weight"], record["domain"], record["loss"], text[:280]))
        if len(samples) == count:
            break
    return samples
