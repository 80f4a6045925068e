"""What a process makes of one SIGTERM, and of more."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from ray_dwm.engine import stopping


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ([0.0], ["asked"]),
        ([0.0, 0.1, 29.9], ["asked"]),
        ([0.0, 30.0], ["asked", "ended"]),
        ([0.0, 29.0, 31.0, 32.0], ["asked", "ended", "ended"]),
    ],
)
def test_a_second_sigterm_ends_the_process_unless_it_is_the_same_request(
    at: list[float], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    clock = iter(at)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ended"))
    try:
        with stopping.on_sigterm(lambda: heard.append("asked")):
            for _ in at:
                signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [*told, "ended"]  # after it, all is as before
