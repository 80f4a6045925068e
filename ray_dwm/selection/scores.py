"""Scores of a whole pool: gathered from blocks, checked, and kept as a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.errors import DataError
from ray_dwm.selection.method import Arrays, RowFunction, Scored

FILE = "scores.parquet"
_DIGEST = b"ray_dwm.scores_of"


@dataclass(frozen=True, slots=True)
class Keyed:
    """A scorer whose results also name the rows."""

    scorer: RowFunction

    def __call__(self, rows: Rows) -> Arrays:
        return {"sample_id": rows.sample_ids, "domain": rows.domains, **self.scorer(rows)}


def gather(blocks: Iterable[Arrays], pool: Manifest, rows: int | None = None) -> Scored:
    """The scores of all rows, or of so many, 12 bytes a row, from the results of `Keyed`, in order."""
    rows = pool.rows if rows is None else rows
    scores = np.empty(rows)
    domains = np.empty(rows, dtype=np.int32)
    at = 0
    for block in blocks:
        stop = at + len(block["score"])
        scores[at:stop], domains[at:stop] = block["score"], block["domain"]
        at = stop
    assert at == rows, f"{at} scores of {rows} rows"
    return Scored(scores, domains)


def require_usable(scored: Scored, method: str) -> None:
    """Check that the scores tell sequences apart.

    Raises:
        DataError: they are not all finite, or all equal.
    """
    bad = int((~np.isfinite(scored.scores)).sum())
    if bad:
        raise DataError(
            f"{bad} of {len(scored)} scores of {method} are not finite: the LM or DWM that it looks through has "
            "diverged, train it with a lower rate (selection.proxy.lr of a proxy) or name another"
        )
    if len(scored) > 1 and np.ptp(scored.scores) == 0:
        raise DataError(
            f"all {len(scored)} scores of {method} are {scored.scores[0]:g}: it sees no difference between the "
            "sequences; give it another target set or other options, or use data.selection=random"
        )


def kept(path: Path, blocks: Iterable[Arrays], pool: Manifest, digest: str) -> Iterator[Arrays]:
    """The blocks, written to a file as they pass, with what they are of; column `domain` has names."""
    names = pa.array(pool.domain_names)
    writer = None
    try:
        for block in blocks:
            columns = {name: pa.array(values) for name, values in block.items()}
            columns["domain"] = pa.DictionaryArray.from_arrays(pa.array(block["domain"]), names)
            table = pa.table(columns).replace_schema_metadata({_DIGEST: digest.encode()})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            yield block
    finally:
        if writer is not None:
            writer.close()


def check(path: Path, pool: Manifest, digest: str) -> None:
    """Look at what a file of scores says that it is of, without reading any.

    Raises:
        DataError: the file is damaged, or of another pool, method or target.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"scores {path} cannot be read ({str(error).splitlines()[0]}): score anew") from None
    found = (file.schema_arrow.metadata or {}).get(_DIGEST, b"").decode(errors="replace")
    if found != digest or file.metadata.num_rows != pool.rows:
        raise DataError(
            f"scores {path} are of another pool, target set, seed or method: leave selection.scores empty to score anew"
        )


def read(path: Path, pool: Manifest, digest: str) -> Scored:
    """Scores that an earlier selection kept.

    Raises:
        DataError: the file is damaged, or of another pool, method or target.
    """
    check(path, pool, digest)
    try:
        table = pq.read_table(path, columns=["sample_id", "domain", "score"])
        ids, scores = table.column("sample_id").to_numpy(), table.column("score").cast(pa.float64()).to_numpy()
        domain = table.column("domain").unify_dictionaries().combine_chunks()
        names, codes = domain.dictionary.to_pylist(), domain.indices.to_numpy()
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"scores {path} cannot be read ({str(error).splitlines()[0]}): score anew") from None
    if not (np.array_equal(ids, open_shards(str(pool.folder)).sample_ids()) and set(names) <= pool.domains.keys()):
        raise DataError(
            f"scores {path} are not in the order of the pool {pool.folder}: leave the file as it was written"
        )
    places = {name: code for code, name in enumerate(pool.domain_names)}
    return Scored(scores, np.array([places[name] for name in names], dtype=np.int32)[codes])
