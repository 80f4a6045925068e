"""What a file system must be able to do for a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ray_dwm.data import filesystem


def test_a_real_file_system_lacks_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    assert filesystem.lacking(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def refuse(*rest: Any, **options: Any) -> Any:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def no_append(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
    return refuse() if mode == "a" else open(path, mode, *rest, **options)


def from_the_start(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
    return open(path, "w" if mode == "a" else mode, *rest, **options)


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "lack"),
    [
        (Path, "write_text", refuse, "write a file (Operation not supported)"),
        (Path, "open", no_append, "append to a file (Operation not supported)"),
        (Path, "open", from_the_start, "append to a file"),
        (filesystem.fcntl, "flock", refuse, "lock a file (Operation not supported)"),
        (Path, "rename", refuse, "rename a folder (Operation not supported)"),
    ],
)
def test_what_is_lacking_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, replacement: Any, lack: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        assert filesystem.lacking(tmp_path) == lack
    assert list(tmp_path.iterdir()) == []
