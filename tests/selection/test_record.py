"""What a selection says to people: before it starts, and what it did to each domain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from ray_dwm.selection.method import Scored
from ray_dwm.selection.record import describe, opening, table


def pool() -> Any:
    return SimpleNamespace(rows=8, seq_len=128, domain_names=["code", "noise", "web"])


def test_table() -> None:
    """Six of eight rows: three of four, none of one, all of three."""
    scored = Scored(np.arange(8.0), np.array([0, 0, 0, 0, 1, 2, 2, 2], dtype=np.int32))
    lines = table(describe(pool(), scored, np.array([0, 1, 2, 5, 6, 7]))).splitlines()
    assert [line.split() for line in lines] == [
        ["domain", "pool,", "tokens", "share", "selected,", "tokens", "share", "taken"],
        ["code", "512", "50.0%", "384", "50.0%", "75.0%"],
        ["noise", "128", "12.5%", "0", "0.0%", "0.0%"],
        ["web", "384", "37.5%", "384", "50.0%", "100.0%"],
        ["all", "1,024", "100.0%", "768", "100.0%", "75.0%"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_opening() -> None:
    text = opening("dsir", pool(), 6, ["target", "target-2"])
    assert text == "dsir: 6 of 8 sequences, 768 of 1,024 tokens, for target, target-2"
    assert opening("random", pool(), 6, []).endswith(" tokens, without a target set")
