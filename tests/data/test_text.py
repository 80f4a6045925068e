"""The same documents from every file format, and damaged files by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ray_dwm.data.text import Document, Reject, find_files, read_documents
from ray_dwm.errors import DataError

RECORDS = [{"text": "One sentence.", "domain": "a"}, {"text": "Zwei Sätze. 三", "domain": "b"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write_jsonl(path: Path) -> None:
    path.write_bytes(LINES)


def write_zst(path: Path) -> None:
    """Two frames, as parallel compressors write them."""
    middle = LINES.index(b"\n") + 1
    path.write_bytes(zstandard.compress(LINES[:middle]) + zstandard.compress(LINES[middle:]))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


@pytest.mark.parametrize(
    ("name", "write"), [("x.jsonl", write_jsonl), ("x.jsonl.zst", write_zst), ("x.parquet", write_parquet)]
)
def test_formats_hold_the_same_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert list(read_documents(tmp_path / name, "domain")) == [Document(r["text"], r["domain"]) for r in RECORDS]


def test_plain_text_is_one_document_of_the_domain_that_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "novels.txt").write_text("Once.\n\nTwice.")
    assert list(read_documents(tmp_path / "novels.txt", "domain")) == [Document("Once.\n\nTwice.", "novels")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{nope", "no JSON"),
        (b'"text"', "no field `text`"),
        (b'{"text": 3}', "no field `text`"),
        (b'{"text": "  "}', "empty text"),
        (b'{"text": "x", "domain": 3}', "is no string"),
        (b'{"text": "bad \\ud800"}', "lone surrogates"),
        (b'{"text": "x", "domain": "\\ud800"}', "lone surrogates"),
        (b"[" * 200_000, "no JSON"),
        (b'{"text": "\xff\xfe"}', "no JSON"),
    ],
)
def test_a_bad_record_is_named_and_the_next_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n\n" + LINES)
    first, *rest = read_documents(path, "domain")
    assert isinstance(first, Reject)
    assert (first.file, first.record) == (str(path), 1)
    assert reason in first.reason
    assert len(rest) == 2


def test_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xe9")
    (reject,) = read_documents(tmp_path / "x.txt", "domain")
    assert isinstance(reject, Reject) and reject.reason == "not UTF-8"


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.parquet"])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_cut_file_stops_with_its_name(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    (write_zst if name.endswith("zst") else write_parquet)(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        list(read_documents(path, "domain"))


def test_files_are_found_by_folder_glob_and_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "notes.md"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in find_files(str(tmp_path), "k")] == ["a.txt", "b.jsonl"]
    assert [f.name for f in find_files(str(tmp_path / "*.jsonl"), "k")] == ["b.jsonl"]
    with pytest.raises(DataError, match="unknown ending"):
        find_files(str(tmp_path / "notes.md"), "k")
