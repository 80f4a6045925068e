"""Documents to sequences: nothing lost but the counted remainder, no domains mixed, ids stable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_dwm.data.packing import FileReport, Packer, pack_file
from ray_dwm.data.tokenization import Tokenizer
from ray_dwm.errors import DataError

TOKENIZER = Path(__file__).resolve().parents[2] / "corpus" / "tokenizer"


def test_packer_cuts_the_stream_where_it_is_full() -> None:
    packer = Packer(4)
    assert packer.add([1, 2, 3]) == []
    assert packer.add([4, 5, 6, 7, 8, 9]) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert packer.remainder == 1


@pytest.fixture
def packed(tmp_path: Path) -> tuple[FileReport, list[pa.Table], list[dict[str, str]]]:
    records = [{"text": f"{word} number {i}. " * (i + 1), "domain": word} for i in range(9) for word in ("sea", "hill")]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records) + "broken\n")
    report = pack_file(source, 3, tmp_path, Tokenizer(TOKENIZER), seq_len=16, rows_per_file=10, domain_field="domain")
    tables = [pa.ipc.open_file(tmp_path / shard.name).read_all() for shard in report.shards]
    return report, tables, records


def test_sequences_decode_to_the_documents_of_one_domain(
    packed: tuple[FileReport, list[pa.Table], list[dict[str, str]]],
) -> None:
    report, tables, records = packed
    tokenizer = Tokenizer(TOKENIZER)
    table = pa.concat_tables(t.set_column(1, "domain", t["domain"].cast(pa.string())) for t in tables)
    for domain in ("sea", "hill"):
        chosen = table.filter(pa.array([d == domain for d in table["domain"].to_pylist()]))
        ids = [token for row in chosen["input_ids"].to_pylist() for token in row]
        whole = [i for r in records if r["domain"] == domain for i in tokenizer.encode([r["text"]])[0]]
        assert ids == whole[: len(ids)]
        assert len(whole) - len(ids) < 16
        assert report.tokens[domain] == len(whole)
        assert report.rows[domain] == len(chosen)
    assert report.dropped_tokens == sum(report.tokens.values()) - 16 * len(table)


def test_ids_name_file_and_row(packed: tuple[FileReport, list[pa.Table], list[dict[str, str]]]) -> None:
    report, tables, _ = packed
    ids = np.concatenate([t["sample_id"].to_numpy() for t in tables])
    np.testing.assert_array_equal(ids, np.arange(len(ids)) + (3 << 32))
    assert [shard.rows for shard in report.shards[:-1]] == [10] * (len(report.shards) - 1)
    assert [(r.record, r.reason.split(":")[0]) for r in report.rejects] == [(19, "no JSON")]


def test_documents_are_closed_and_markers_in_text_stay_text() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    (ids,) = tokenizer.encode(["a <|endoftext|> b"])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "a <|endoftext|> b"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        Tokenizer(tmp_path)
