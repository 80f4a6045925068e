"""What is written to a shard is what is read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_dwm.data import shards
from ray_dwm.data.manifest import DomainStats, Manifest, load_manifest
from ray_dwm.data.shards import ShardReader, token_type, write_shard
from ray_dwm.errors import DataError


def folder_of(path: Path, *, vocab: int, mask: bool, rows: tuple[int, ...] = (1500, 3)) -> tuple[Manifest, np.ndarray]:
    """Shards of random rows and their token ids; more rows than one record batch holds."""
    path.mkdir()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, size=(sum(rows), 6))
    files, start = [], 0
    for number, count in enumerate(rows):
        part = slice(start, start + count)
        files.append(
            write_shard(
                path / f"{number}.arrow",
                sample_ids=np.arange(start, start + count),
                domains=["ab"[i % 2] for i in range(start, start + count)],
                input_ids=ids[part],
                vocab_size=vocab,
                loss_mask=ids[part] % 2 == 0 if mask else None,
            )
        )
        start += count
    stats = DomainStats(rows=1, tokens=6, bytes_per_token=1.0)
    manifest = Manifest(
        folder=path,
        seq_len=6,
        vocab_size=vocab,
        eos_token_id=0,
        tokenizer_name="t",
        tokenizer_sha256="0",
        files=tuple(files),
        domains={"a": stats, "b": stats},
        made_by={},
    )
    manifest.write()
    return manifest, ids


@pytest.mark.parametrize("vocab", [1000, 100_000])
@pytest.mark.parametrize("mask", [False, True])
def test_rows_come_back_in_the_order_asked_for(tmp_path: Path, vocab: int, mask: bool) -> None:
    _, ids = folder_of(tmp_path / "s", vocab=vocab, mask=mask)
    reader = ShardReader(load_manifest(tmp_path / "s"))
    reader.verify()
    wanted = np.array([1502, 0, 1023, 1024, 1500, 7, 1499])
    rows = reader.take(wanted)
    np.testing.assert_array_equal(rows.sample_ids, wanted)
    np.testing.assert_array_equal(rows.domains, wanted % 2)
    np.testing.assert_array_equal(rows.input_ids, ids[wanted])
    if mask:
        assert rows.loss_mask is not None
        np.testing.assert_array_equal(rows.loss_mask, ids[wanted] % 2 == 0)
    else:
        assert rows.loss_mask is None


def test_pages_are_let_go_of_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ids = folder_of(tmp_path / "s", vocab=1000, mask=False)
    monkeypatch.setattr(shards, "_MAPPED_BYTES", 24)  # after every other row
    reader = ShardReader(load_manifest(tmp_path / "s"))
    for row in (1502, 0, 1023, 0, 1502):
        rows = reader.take(np.array([row]))
        assert rows.input_ids.dtype == np.uint16
        np.testing.assert_array_equal(rows.input_ids, ids[[row]])


def test_tokens_take_two_bytes_where_they_fit() -> None:
    assert (token_type(2**16), token_type(2**16 + 1)) == (pa.uint16(), pa.int32())


def test_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    manifest, _ = folder_of(tmp_path / "s", vocab=1000, mask=False)
    assert load_manifest(tmp_path / "s") == manifest


def test_manifest_of_a_later_version_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "s", vocab=1000, mask=False)
    path = tmp_path / "s" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match="format version 2, this program reads 1"):
        load_manifest(tmp_path / "s")
