"""Small files appear whole, whoever else writes them; damaged ones are one line. A folder is one process's."""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ray_dwm.data import records
from ray_dwm.data.records import alone_in, read_arrays, write_whole
from ray_dwm.errors import DataError, UserError


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


@pytest.mark.parametrize(
    ("job", "ends_s", "waited_s", "refused"), [(False, 5, 0, True), (True, 5, 5, False), (True, 500, 300, True)]
)
def test_a_job_waits_for_the_attempt_before_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: bool,
    ends_s: float,
    waited_s: float,
    refused: bool,
) -> None:
    now, former = [0.0], ExitStack()

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] >= ends_s:
            former.close()

    monkeypatch.setattr(records, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with former:
        former.enter_context(alone_in(tmp_path, "run folder"))
        refusal = pytest.raises(UserError, match=rf"^run folder {tmp_path} is in use by another process: wait for it")
        with refusal if refused else nullcontext(), alone_in(tmp_path, "run folder"):
            assert not refused
    assert now[0] == waited_s
    assert ("is in use by another process: waiting for up to 300 s" in capsys.readouterr().out) is job


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no zip", b"pickled"])
def test_damaged_blocks_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "5-0.npz"
    path.write_bytes(content)
    if content == b"pickled":
        np.savez(path, x=np.array([object()]))
    with pytest.raises(DataError, match=r"a finished block, is damaged .*: remove it and start the same") as raised:
        read_arrays(path)
    assert "\n" not in str(raised.value)
