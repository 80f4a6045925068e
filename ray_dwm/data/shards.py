"""Arrow IPC shards of packed sequences: writer, and a reader that takes rows by number from memory maps.

Columns: `sample_id: int64`, `domain: dictionary<string>`, `input_ids: fixed_size_list<uint16|int32>[T]` and,
for sets of which only some tokens count, `loss_mask: fixed_size_list<bool>[T]`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_dwm.data.manifest import Manifest, ShardFile, file_sha256, load_manifest
from ray_dwm.errors import DataError

BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """Some sequences. n = rows, T = tokens of a sequence."""

    sample_ids: NDArray[np.int64]
    """(n,)"""
    domains: NDArray[np.int32]
    """(n,) codes into the manifest's sorted domain names."""
    input_ids: NDArray[np.int64]
    """(n, T)"""
    loss_mask: NDArray[np.bool_] | None = None
    """(n, T), or None where every token counts."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> Rows:
        mask = None if self.loss_mask is None else self.loss_mask[index]
        return Rows(self.sample_ids[index], self.domains[index], self.input_ids[index], mask)


def token_type(vocab_size: int) -> pa.DataType:
    """The smallest stored type that holds every token id."""
    return pa.uint16() if vocab_size <= 2**16 else pa.int32()


def _fixed_lists(values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=kind), values.shape[1])


def write_shard(
    path: Path,
    *,
    sample_ids: NDArray[np.int64],
    domains: list[str],
    input_ids: NDArray[np.integer],
    vocab_size: int,
    loss_mask: NDArray[np.bool_] | None = None,
) -> ShardFile:
    """Write one Arrow IPC file.

    Args:
        sample_ids: (n,), unique in the folder.
        domains: n domain names.
        input_ids: (n, T).
        loss_mask: (n, T), optional.
    """
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(sample_ids, pa.int64()),
        "domain": pa.array(domains, pa.string()).dictionary_encode(),
        "input_ids": _fixed_lists(input_ids, token_type(vocab_size)),
    }
    if loss_mask is not None:
        columns["loss_mask"] = _fixed_lists(loss_mask, pa.bool_())
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return ShardFile(name=path.name, rows=len(table), bytes=path.stat().st_size, sha256=file_sha256(path))


class ShardReader:
    """Rows of a folder by number, read from memory maps: nothing is loaded that is not asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = [0, *accumulate(manifest.rows_per_file)]
        self._codes = {name: code for code, name in enumerate(manifest.domain_names)}
        self._open = lru_cache(maxsize=256)(self._open_file)

    def _open_file(self, index: int) -> tuple[list[pa.RecordBatch], list[int]]:
        file = self.manifest.files[index]
        path = self.manifest.folder / file.name
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            width = reader.schema.field("input_ids").type.list_size
        except (pa.ArrowInvalid, OSError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"shard {path} is no readable token shard ({reason}): prepare anew") from None
        starts = [0, *accumulate(len(batch) for batch in batches)]
        if starts[-1] != file.rows or width != self.manifest.seq_len:
            raise DataError(
                f"shard {path} has {starts[-1]} rows of {width} tokens, the manifest says {file.rows} of "
                f"{self.manifest.seq_len}: prepare anew"
            )
        return batches, starts

    def verify(self, threads: int = 4) -> None:
        """Compare every file with the manifest: checksum, rows, columns, domains. About a minute for 60 GB.

        Raises:
            DataError: naming the first file that differs.
        """
        files = self.manifest.files
        with ThreadPoolExecutor(threads) as pool:
            digests = pool.map(lambda file: file_sha256(self.manifest.folder / file.name), files)
            for index, (file, digest) in enumerate(zip(files, digests, strict=True)):
                if digest != file.sha256:
                    path = self.manifest.folder / file.name
                    raise DataError(f"shard {path} differs from its checksum: it is damaged, prepare anew")
                for batch in self._open(index)[0]:
                    unknown = set(batch.column("domain").dictionary.to_pylist()) - self._codes.keys()
                    if unknown:
                        raise DataError(
                            f"shard {self.manifest.folder / file.name} has domain {min(unknown)}, which the manifest "
                            "does not list: prepare anew"
                        )

    def sample_ids(self) -> NDArray[np.int64]:
        """Ids of all rows in order, without touching the tokens."""
        parts = [b.column("sample_id").to_numpy() for i in range(len(self.manifest.files)) for b in self._open(i)[0]]
        return np.concatenate(parts)

    def take(self, rows: NDArray[np.int64]) -> Rows:
        """The given rows (numbered through the whole folder), in the given order."""
        parts: list[tuple[NDArray[np.int64], Rows]] = []
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for index in np.unique(files):
            where = np.flatnonzero(files == index)
            local = rows[where] - self._starts[index]
            batches, starts = self._open(int(index))
            owners = np.searchsorted(starts, local, side="right") - 1
            for owner in np.unique(owners):
                chosen = owners == owner
                batch = batches[int(owner)]
                parts.append((where[chosen], self._rows(batch, local[chosen] - starts[int(owner)])))
        return _reorder(parts, len(rows))

    def _rows(self, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> Rows:
        domain = batch.column("domain")
        codes = np.array([self._codes[name] for name in domain.dictionary.to_pylist()], dtype=np.int32)
        mask = None
        if "loss_mask" in batch.schema.names:
            values = batch.column("loss_mask").flatten().to_numpy(zero_copy_only=False)
            mask = values.reshape(len(batch), -1)[rows]
        tokens = batch.column("input_ids").flatten().to_numpy().reshape(len(batch), -1)
        return Rows(
            batch.column("sample_id").to_numpy()[rows],
            codes[domain.indices.to_numpy()[rows]],
            tokens[rows].astype(np.int64),
            mask,
        )


def _reorder(parts: list[tuple[NDArray[np.int64], Rows]], count: int) -> Rows:
    order = np.argsort(np.concatenate([where for where, _ in parts]), kind="stable")
    assert len(order) == count, "a row number lies outside the folder"
    rows = [part for _, part in parts]
    masks = [part.loss_mask for part in rows]
    return Rows(
        np.concatenate([part.sample_ids for part in rows])[order],
        np.concatenate([part.domains for part in rows])[order],
        np.concatenate([part.input_ids for part in rows])[order],
        None if any(mask is None for mask in masks) else np.concatenate([m for m in masks if m is not None])[order],
    )


@lru_cache(maxsize=8)
def open_shards(folder: str) -> ShardReader:
    """A reader, shared within the process."""
    return ShardReader(load_manifest(folder))
