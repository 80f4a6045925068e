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
"""Bytes of rows after which a reader lets go of its pages: about a window of the read plan, or it maps all in time."""


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


class _Shard:
    """One file, mapped. Its record batches are opened when rows of them are asked for, so that a start is quick."""

    def __init__(self, path: Path, file: ShardFile, seq_len: int, codes: dict[str, int]) -> None:
        self._path, self._file, self._codes = path, file, codes
        try:
            with path.open("rb") as stream:
                self.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._reader = pa.ipc.open_file(pa.py_buffer(self.map))
            width = self._reader.schema.field("input_ids").type.list_size
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, AttributeError) as error:
            raise self._unreadable(error) from None
        if width != seq_len:
            raise DataError(f"shard {path} has rows of {width} tokens, the manifest says {seq_len}: prepare anew")
        if self._reader.num_record_batches != len(self):
            raise DataError(
                f"shard {path} has {self._reader.num_record_batches} record batches, by the manifest {len(self)}: "
                "prepare anew"
            )
        self._chunks: dict[int, _Chunk] = {}

    def __len__(self) -> int:
        """Record batches."""
        return -(-self._file.rows // BATCH_ROWS)

    def chunk(self, index: int) -> _Chunk:
        """A record batch; all but the last have BATCH_ROWS rows."""
        if index not in self._chunks:
            try:
                chunk = _Chunk(self._reader.get_batch(index), self._codes)
            except (pa.ArrowInvalid, ValueError, KeyError, AttributeError) as error:
                raise self._unreadable(error) from None
            rows = min(BATCH_ROWS, self._file.rows - index * BATCH_ROWS)
            if len(chunk.sample_ids) != rows:
                raise DataError(
                    f"shard {self._path} has {len(chunk.sample_ids)} rows in record batch {index}, by the manifest it "
                    f"has {rows}: prepare anew"
                )
            self._chunks[index] = chunk
        return self._chunks[index]

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"shard {self._path} is no readable token shard ({str(error).splitlines()[0]}): prepare anew")


class ShardReader:
    """Rows of a folder by number, read from memory maps: nothing is loaded that is not asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = np.cumsum([0, *manifest.rows_per_file])
        self._codes = {name: code for code, name in enumerate(manifest.domain_names)}
        self._open = lru_cache(maxsize=256)(self._open_file)
        self._touched: set[mmap.mmap] = set()
        self._taken = 0

    @property
    def row_bytes(self) -> int:
        """Of one sequence with its id and domain, without a loss mask."""
        return self.manifest.seq_len * token_type(self.manifest.vocab_size).bit_width // 8 + 12

    def _open_file(self, index: int) -> _Shard:
        file = self.manifest.files[index]
        return _Shard(self.manifest.folder / file.name, file, self.manifest.seq_len, self._codes)

    def _chunks(self, index: int) -> Iterator[_Chunk]:
        """All chunks of a file."""
        shard = self._open(index)
        return map(shard.chunk, range(len(shard)))

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
                for chunk in self._chunks(index):
                    unknown = set(chunk.domain_names) - self._codes.keys()
                    if unknown:
                        raise DataError(
                            f"shard {self.manifest.folder / file.name} has domain {min(unknown)}, which the manifest "
                            "does not list: prepare anew"
                        )

    def sample_ids(self) -> NDArray[np.int64]:
        """Ids of all rows in order, without touching the tokens."""
        chunks = [chunk for index in range(len(self.manifest.files)) for chunk in self._chunks(index)]
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
        files = np.searchsorted(self._starts, rows, side="right") - 1
        assert files.min() >= 0 and files.max() < len(self.manifest.files), "a row number lies outside the folder"
        for index, of_file in _grouped(files):
            shard = self._open(index)
            self._touched.add(shard.map)
            local = rows[of_file] - self._starts[index]
            for owner, of_chunk in _grouped(local // BATCH_ROWS):
                yield shard.chunk(owner), local[of_chunk] - owner * BATCH_ROWS, of_file[of_chunk]


def _grouped(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each key that occurs, and its places."""
    order = np.argsort(keys, kind="stable")
    cuts = [0, *(np.flatnonzero(np.diff(keys[order])) + 1).tolist(), len(keys)]
    for start, stop in pairwise(cuts):
        yield int(keys[order[start]]), order[start:stop]


@lru_cache(maxsize=8)
def open_shards(folder: str) -> ShardReader:
    """A reader, shared within the process."""
    return ShardReader(load_manifest(folder))
