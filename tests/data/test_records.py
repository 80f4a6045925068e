"""Small files appear whole, whoever else writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_dwm.data.records import write_whole


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
