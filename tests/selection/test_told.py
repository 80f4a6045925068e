"""What is said of how far work is."""

from __future__ import annotations

import time

import pytest

from ray_dwm.selection.told import Told


def test_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 4.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told = Told("scores", 6, done=2)
    for _ in range(4):
        told.one()
    assert capsys.readouterr().out.splitlines() == [
        "scores: 6 blocks, 2 are there from before",
        "scores: 4 of 6 blocks, 0:12 left",
        "scores: 6 of 6 blocks, 20 s",
    ]


def test_one_piece_is_told_when_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    Told("fit", 1, unit="rounds").one()
    assert capsys.readouterr().out.splitlines() == ["fit: 1 of 1 rounds, 0 s"]
