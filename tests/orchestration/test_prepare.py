"""Text to shards on Ray: the same bytes for any parallelism, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_dwm.config import PrepareConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.tokenization import Tokenizer
from ray_dwm.errors import DwmError
from ray_dwm.orchestration.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "corpus" / "tokenizer"


pytestmark = pytest.mark.usefixtures("driver")


def write_text(folder: Path, files: int = 4) -> Path:
    """Small JSONL files of two domains with one bad record each."""
    folder.mkdir()
    for index in range(files):
        records = [{"text": f"The {word} of {index} " * 30, "domain": word} for word in ("sea", "hill")]
        lines = [json.dumps(record) for record in records] + ["{broken", json.dumps({"text": 7})]
        (folder / f"{index}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(**changes: Any) -> PrepareConfig:
    return PrepareConfig(tokenizer=str(TOKENIZER), seq_len=16, rows_per_file=7, **changes)


def test_output_does_not_depend_on_workers(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder, workers in zip(folders, (1, 3), strict=True):
        prepare("prepare.train", str(text), folder, settings(workers=workers))
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert Tokenizer(folders[0] / "tokenizer").sha256 == load_manifest(folders[0]).tokenizer_sha256
    for name in set(names[0]) - {"tokenizer"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    rejects = [json.loads(line) for line in (folders[0] / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["record"]) for r in rejects] == [(f"{i}.jsonl", n) for i in range(4) for n in (3, 4)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: (text / "9.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd junk"), "9.jsonl.zst cannot be read"),
        (lambda text: (text / "9.parquet").write_bytes(b"PAR1"), "9.parquet cannot be read"),
        (lambda text: (text / "9.jsonl").write_text('{"text": "short", "domain": "tiny"}\n'), "domain tiny"),
        (lambda text: [path.write_text("[]\n") for path in text.iterdir()], "no usable record"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, spoil: Any, message: str) -> None:
    text = write_text(tmp_path / "text")
    spoil(text)
    with pytest.raises(DwmError, match=message) as raised:
        prepare("prepare.train", str(text), tmp_path / "out", settings())
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DwmError, match="exists already"):
        prepare("prepare.train", str(write_text(tmp_path / "text")), tmp_path / "out", settings())
