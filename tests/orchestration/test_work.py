"""What an interrupted piece of work leaves to its next attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_dwm.errors import Stopped
from ray_dwm.orchestration.work import timed, work_folder, work_path


def test_seconds_of_all_attempts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "seconds").write_text("7.5")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), timed(tmp_path):
            raise KeyboardInterrupt
    before = float((tmp_path / "seconds").read_text())
    assert before > 7.5
    with timed(tmp_path) as seconds:
        assert seconds() > before


def test_what_is_left_serves_the_same_work_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for seed, found in ((0, False), (0, True), (1, False)):
        told = pytest.raises(Stopped, match="out interrupted: the same command continues")
        with told, work_folder(output, {"seed": seed}) as work:
            assert (work / "block").exists() is found
            (work / "block").touch()
            raise KeyboardInterrupt
    with work_folder(output, {"seed": 1}) as work:
        assert (work / "block").exists()
    assert not work_path(output).exists()


def test_a_closed_pipe_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), work_folder(tmp_path / "out", {}):
        raise BrokenPipeError
