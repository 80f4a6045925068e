"""Small files appear whole, whoever else writes them; damaged ones are one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ray_dwm.data.records import read_arrays, write_whole
from ray_dwm.errors import DataError


def test_two_nodes_that_write_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in a process of the same number, and one in the midst of the other's writing."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, ordinary, temporaries = tmp_path / "file.json", os.replace, []

    def replace(source: Path, target: Path) -> None:
        temporaries.append(source)
        if len(temporaries) == 1:
            write_whole(path, "other")
        ordinary(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_whole(path, "one")
    assert path.read_text() == "one"
    assert len(set(temporaries)) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no zip", b"pickled"])
def test_damaged_blocks_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "5-0.npz"
    path.write_bytes(content)
    if content == b"pickled":
        np.savez(path, x=np.array([object()]))
    with pytest.raises(DataError, match=r"a finished block, is damaged .*: remove it and start the same") as raised:
        read_arrays(path)
    assert "\n" not in str(raised.value)
