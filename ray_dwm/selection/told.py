"""How far a piece of work is, said now and then."""

from __future__ import annotations

import time

from ray_dwm.logs import say

_TELL_S = 10.0


class Told:
    """Counts what is done, and says so at most every ten seconds, and at the end."""

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "blocks") -> None:
        """
        Args:
            done: what is there from before.
            unit: what is counted, in the plural.
        """
        self._name, self._total, self._start, self._done, self._unit = name, total, done, done, unit
        self._began = self._last = time.monotonic()
        before = f", {done} are there from before" if done else ""
        if total > 1:
            say(f"{name}: {total} {unit}{before}")  # the first one may take minutes

    def one(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._last < _TELL_S and self._done < self._total:
            return
        self._last = now
        passed = now - self._began
        left = int(passed / (self._done - self._start) * (self._total - self._done))
        end = f"{left // 60}:{left % 60:02d} left" if self._done < self._total else f"{passed:.0f} s"
        say(f"{self._name}: {self._done} of {self._total} {self._unit}, {end}")
