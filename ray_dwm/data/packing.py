"""Documents to packed sequences of fixed length, one stream per domain, one unit of work per input file.

A file's output depends on nothing but the file, so any number of workers gives the same shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ray_dwm.data.manifest import ShardFile
from ray_dwm.data.shards import write_shard
from ray_dwm.data.text import Document, Reject, read_documents
from ray_dwm.data.tokenization import Tokenizer

_DOCUMENTS_AT_ONCE = 256


class Packer:
    """Concatenates documents of one domain and cuts the stream into sequences of T tokens."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._rest: list[int] = []

    def add(self, ids: list[int]) -> list[list[int]]:
        """The sequences that this document completes."""
        self._rest.extend(ids)
        whole = len(self._rest) // self._seq_len * self._seq_len
        done = [self._rest[i : i + self._seq_len] for i in range(0, whole, self._seq_len)]
        self._rest = self._rest[whole:]
        return done

    @property
    def remainder(self) -> int:
        """Tokens that fill no whole sequence."""
        return len(self._rest)


@dataclass
class FileReport:
    """What one input file became."""

    shards: list[ShardFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of all documents, the dropped remainders included."""
    text_bytes: dict[str, int] = field(default_factory=dict)
    dropped_tokens: int = 0
    documents: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they travel between processes."""
        return asdict(self)


def pack_file(
    source: Path,
    number: int,
    output: Path,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    rows_per_file: int,
    domain_field: str,
) -> FileReport:
    """Tokenise, pack and write one input file.

    Args:
        number: position of the file in the sorted input; sample ids are number * 2^32 + row.
        output: folder for the shards.

    Raises:
        DataError: where the file itself is damaged.
    """
    report = FileReport()
    packers: dict[str, Packer] = {}
    pending: list[tuple[str, list[int]]] = []
    rows = 0

    def flush() -> None:
        nonlocal rows
        if pending:
            path = output / f"part-{number:05d}-{len(report.shards):05d}.arrow"
            ids = np.arange(rows, rows + len(pending), dtype=np.int64) + (np.int64(number) << 32)
            report.shards.append(
                write_shard(
                    path,
                    sample_ids=ids,
                    domains=[domain for domain, _ in pending],
                    input_ids=np.array([tokens for _, tokens in pending]),
                    vocab_size=tokenizer.vocab_size,
                )
            )
            rows += len(pending)
            pending.clear()

    records = read_documents(source, domain_field)
    while chunk := list(islice(records, _DOCUMENTS_AT_ONCE)):
        report.rejects.extend(record for record in chunk if isinstance(record, Reject))
        documents = [record for record in chunk if isinstance(record, Document)]
        for document, ids in _encoded(documents, tokenizer):
            domain = document.domain
            sequences = packers.setdefault(domain, Packer(seq_len)).add(ids)
            report.documents += 1
            _count(report.rows, domain, len(sequences))
            _count(report.tokens, domain, len(ids))
            _count(report.text_bytes, domain, len(document.text.encode(errors="replace")))
            for sequence in sequences:
                pending.append((domain, sequence))
                if len(pending) == rows_per_file:
                    flush()
    flush()
    report.dropped_tokens = sum(packer.remainder for packer in packers.values())
    return report


def _encoded(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int]]]:
    return zip(documents, tokenizer.encode([d.text for d in documents]) if documents else [], strict=True)


def _count(counts: dict[str, int], key: str, amount: int) -> None:
    counts[key] = counts.get(key, 0) + amount
