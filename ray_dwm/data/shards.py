"""Arrow IPC shards of packed sequences: writer, and a reader that takes rows by number from memory maps.

Columns: `sample_id: int64`, `domain: dictionary<string>`, `input_ids: fixed_size_list<uint16|int32>[T]` and,
for sets of which only some tokens count, `loss_mask: fixed_size_list<bool>[T]`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_dwm.data.manifest import Manifest, ShardFile, file_sha256, load_manifest
from ray_dwm.errors import DataError

BATCH_ROWS = 1024
_MAPPED_BYTES = 128 * 2**20
"""Read rows' bytes after which a reader lets go of the pages: about a window of the read plan."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some sequences. n = rows, T = tokens of a sequence."""

    sample_ids: NDArray[np.int64]
    """(n,)"""
    domains: NDArray[np.int32]
    """(n,) codes into the manifest's sorted domain names."""
    input_ids: NDArray[np.integer]
    """(n, T), of the stored type."""
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


def fixed_lists(values: NDArray[np.generic], kind: pa.DataType | None = None) -> pa.Array:
    """A matrix as a column of rows; without `kind` of its own type, and not copied."""
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
        "input_ids": fixed_lists(input_ids, token_type(vocab_size)),
    }
    if loss_mask is not None:
        columns["loss_mask"] = fixed_lists(loss_mask, pa.bool_())
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return ShardFile(name=path.name, rows=len(table), bytes=path.stat().st_size, sha256=file_sha256(path))


class _Chunk:
    """One record batch as arrays that lie in the memory map: nothing is read until rows are chosen."""

    def __init__(self, batch: pa.RecordBatch, codes: dict[str, int]) -> None:
        domain = batch.column("domain")
        self.domain_names = domain.dictionary.to_pylist()
        self._codes = np.array([codes.get(name, -1) for name in self.domain_names], dtype=np.int32)
        self._indices = domain.indices.to_numpy()
        self.sample_ids: NDArray[np.int64] = batch.column("sample_id").to_numpy()
        self.input_ids: NDArray[np.integer] = batch.column("input_ids").flatten().to_numpy().reshape(len(batch), -1)
        self._mask = batch.column("loss_mask") if "loss_mask" in batch.schema.names else None

    def domains(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The manifest's codes of the given rows."""
        return self._codes[self._indices[rows]]

    def loss_mask(self, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """The given rows' masks, unpacked from bits."""
        if self._mask is None:
            return None
        bits = self._mask.take(pa.array(rows)).flatten()
        return bits.to_numpy(zero_copy_only=False).reshape(len(rows), -1)


class ShardReader:
    """Rows of a folder by number, read from memory maps: nothing is loaded that is not asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = np.cumsum([0, *manifest.rows_per_file])
        self._codes = {name: code for code, name in enumerate(manifest.domain_names)}
        self._open = lru_cache(maxsize=256)(self._open_file)
        self._touched: set[mmap.mmap] = set()
        self._taken = 0

    def _open_file(self, index: int) -> tuple[mmap.mmap, list[_Chunk], NDArray[np.int64]]:
        """A file's map, its record batches, and the first row of each with the number of all rows at the end."""
        file = self.manifest.files[index]
        path = self.manifest.folder / file.name
        try:
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            chunks = [_Chunk(reader.get_batch(i), self._codes) for i in range(reader.num_record_batches)]
            width = reader.schema.field("input_ids").type.list_size
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"shard {path} is no readable token shard ({reason}): prepare anew") from None
        starts = np.cumsum([0, *(len(chunk.sample_ids) for chunk in chunks)])
        if starts[-1] != file.rows or width != self.manifest.seq_len:
            raise DataError(
                f"shard {path} has {starts[-1]} rows of {width} tokens, the manifest says {file.rows} of "
                f"{self.manifest.seq_len}: prepare anew"
            )
        return mapped, chunks, starts

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
                for chunk in self._open(index)[1]:
                    unknown = set(chunk.domain_names) - self._codes.keys()
                    if unknown:
                        raise DataError(
                            f"shard {self.manifest.folder / file.name} has domain {min(unknown)}, which the manifest "
                            "does not list: prepare anew"
                        )

    def sample_ids(self) -> NDArray[np.int64]:
        """Ids of all rows in order, without touching the tokens."""
        chunks = [chunk for index in range(len(self.manifest.files)) for chunk in self._open(index)[1]]
        return np.concatenate([chunk.sample_ids for chunk in chunks])

    def take(self, rows: NDArray[np.int64]) -> Rows:
        """The given rows (numbered through the whole folder), in the given order."""
        kind = token_type(self.manifest.vocab_size).to_pandas_dtype()
        sample_ids = np.empty(len(rows), dtype=np.int64)
        domains = np.empty(len(rows), dtype=np.int32)
        input_ids = np.empty((len(rows), self.manifest.seq_len), dtype=kind)
        loss_mask = None
        for chunk, local, where in self._locate(rows):
            sample_ids[where] = chunk.sample_ids[local]
            domains[where] = chunk.domains(local)
            input_ids[where] = chunk.input_ids[local]
            mask = chunk.loss_mask(local)
            if mask is not None:
                loss_mask = np.ones(input_ids.shape, dtype=bool) if loss_mask is None else loss_mask
                loss_mask[where] = mask
        self._forget(input_ids.nbytes)
        return Rows(sample_ids, domains, input_ids, loss_mask)

    def _forget(self, taken: int) -> None:
        """Let go of pages that were read, so that this process does not grow to the size of the corpus."""
        self._taken += taken
        if self._taken >= _MAPPED_BYTES:
            for mapped in self._touched:
                mapped.madvise(mmap.MADV_DONTNEED)  # they stay in the page cache while there is room
            self._touched.clear()
            self._taken = 0

    def _locate(self, rows: NDArray[np.int64]) -> Iterator[tuple[_Chunk, NDArray[np.int64], NDArray[np.int64]]]:
        """Each chunk that holds some of the rows, their numbers within it, and their places in `rows`."""
        for index, of_file in _grouped(self._starts, rows):
            mapped, chunks, starts = self._open(index)
            self._touched.add(mapped)
            local = rows[of_file] - self._starts[index]
            for owner, of_chunk in _grouped(starts, local):
                yield chunks[owner], local[of_chunk] - starts[owner], of_file[of_chunk]


def _grouped(starts: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The parts that hold any of the rows, and which these are; `starts` ends with the number of all rows."""
    owners = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(owners, kind="stable")
    first, last = owners[order[0]], owners[order[-1]]
    assert first >= 0 and last < len(starts) - 1, "a row number lies outside the folder"
    cuts = [0, *(np.flatnonzero(np.diff(owners[order])) + 1).tolist(), len(rows)]
    for start, stop in pairwise(cuts):
        yield int(owners[order[start]]), order[start:stop]


@lru_cache(maxsize=8)
def open_shards(folder: str) -> ShardReader:
    """A reader, shared within the process."""
    return ShardReader(load_manifest(folder))
