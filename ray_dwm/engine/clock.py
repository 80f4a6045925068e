"""Seconds, also of what a GPU does: kernels run after the call that started them has returned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

PHASES = ("data", "dwm_wait", "weigh", "step", "bilevel", "log")
"""Phases of a step: wait for a batch, wait for a DWM version (or take a baseline's anchor), weigh the batch, the LM's
step, the bi-level step, and the logging of the step before."""
EXTRA = ("dwm_wait", "weigh", "bilevel")
"""What plain training does not have."""


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up the durations of marked passages; on a GPU by events in the stream, which do not hold anything up."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Add the body's duration."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def reset(self) -> None:
        """Start anew."""
        self._seconds, self._events = 0.0, []

    @property
    def seconds(self) -> float:
        """What has been added up; on a GPU this waits for the last passage."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events = []
        return self._seconds


@dataclass
class Clock:
    """Seconds spent in each phase of the current step."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    exact: bool = False
    """Whether a phase waits for the device at its ends: on bi-level steps, so that phases do not blur there."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the body's duration to a phase."""
        if self.exact:
            synchronize()
        start = time.perf_counter()
        with record_function(name):
            yield
        if self.exact:
            synchronize()
        self.seconds[name] += time.perf_counter() - start

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase as another's."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def take(self) -> dict[str, float]:
        """The step's seconds; starts anew."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


def overhead(seconds: Mapping[str, float]) -> float:
    """Time of what plain training does not have over the time of the rest."""
    extra = sum(seconds[name] for name in EXTRA)
    return extra / max(sum(seconds[name] for name in PHASES) - extra, 1e-9)
