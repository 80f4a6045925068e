"""Documents from .jsonl, .jsonl.zst, .parquet and .txt files."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from ray_dwm.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
_ENDINGS = ", ".join(SUFFIXES)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its domain."""

    text: str
    domain: str


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was skipped, and why."""

    file: str
    record: int
    """From 1: the line, or the row."""
    reason: str


def find_files(pattern: str, key: str) -> list[Path]:
    """Files of a folder, a glob or a single path, sorted by name.

    Raises:
        DataError: where there is none, or one has an unknown ending.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES)]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not pattern or not files:
        raise DataError(f"{key} is {pattern!r}, no text files there: name a folder, file or glob of {_ENDINGS}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file} has an unknown ending: {key} reads {_ENDINGS}")
    return [file.absolute() for file in files]


def read_documents(file: Path, domain_field: str) -> Iterator[Document | Reject]:
    """Documents of a file in order, with bad records as Rejects in their place.

    Raises:
        DataError: where the file itself is damaged.
    """
    stem = file.name.split(".")[0]
    try:
        if file.name.endswith(".txt"):
            yield _document({"text": file.read_bytes()}, stem, domain_field, file, 1)
        elif file.name.endswith(".parquet"):
            yield from _parquet(file, stem, domain_field)
        else:
            yield from _jsonl(file, stem, domain_field)
    except (OSError, zstandard.ZstdError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read ({str(error).splitlines()[0]}): replace it or leave it out") from None


def _jsonl(file: Path, stem: str, domain_field: str) -> Iterator[Document | Reject]:
    with file.open("rb") as raw:
        if file.name.endswith(".zst"):
            _require_whole(file)
            stream: Any = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        else:
            stream = raw
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Reject(str(file), number, f"no JSON: {str(error).splitlines()[0]}")
                continue
            yield _document(record, stem, domain_field, file, number)


def _require_whole(file: Path) -> None:
    """zstandard's stream reader ends silently at a cut file; the last frame's end tells."""
    with file.open("rb") as raw:
        decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
        while chunk := raw.read(1 << 20):
            while chunk:
                decompressor.decompress(chunk)
                if not decompressor.eof:
                    break
                chunk = decompressor.unused_data
                if chunk:
                    decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
        if not decompressor.eof:
            raise zstandard.ZstdError("the compressed data ends early")


def _parquet(file: Path, stem: str, domain_field: str) -> Iterator[Document | Reject]:
    number = 0
    reader = pq.ParquetFile(file)
    columns = [name for name in ("text", domain_field) if name in reader.schema_arrow.names]
    for batch in reader.iter_batches(batch_size=1024, columns=columns):
        for record in batch.to_pylist():
            number += 1
            yield _document(record, stem, domain_field, file, number)


def _document(record: Any, stem: str, domain_field: str, file: Path, number: int) -> Document | Reject:
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return Reject(str(file), number, "not UTF-8")
    if not isinstance(text, str):
        return Reject(str(file), number, "no field `text` of type string")
    if not text.strip():
        return Reject(str(file), number, "empty text")
    domain = record.get(domain_field) or stem
    if not isinstance(domain, str):
        return Reject(str(file), number, f"field `{domain_field}` is no string")
    if any("\ud800" <= c <= "\udfff" for c in text) or any("\ud800" <= c <= "\udfff" for c in domain):
        return Reject(str(file), number, "no Unicode text: it holds lone surrogates")
    return Document(text, domain)
