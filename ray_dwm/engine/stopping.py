"""SIGTERM as a request: the step that is being taken ends, a checkpoint is saved, and then the run ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ray_dwm.errors import Stopped

NOTICE_INTERVAL_S = 5.0
"""Between two looks, by all ranks together, at whether a node is about to be taken away."""
SAME_REQUEST_S = 30.0
"""For so long after the first, a further SIGTERM is the same request: where a job is deleted on Kubernetes, Ray sends
one to the driver and to its children, the pod's hook another, and an experiment's driver one to its cells."""


@contextmanager
def on_sigterm(ask: Callable[[], object]) -> Iterator[None]:
    """Call `ask` at a SIGTERM instead of dying of it; a second one, SAME_REQUEST_S later, ends the process as ever.

    Only a process's main thread may take signals: in another one, as in Ray's workers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    asked_at: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        del frame
        if asked_at is None:
            asked_at = time.monotonic()
            ask()
        elif time.monotonic() >= asked_at + SAME_REQUEST_S:
            signal.signal(number, before)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopped_by_sigterm(message: str) -> Iterator[None]:
    """Have a SIGTERM end the body at once, in which there is nothing to be saved.

    Raises:
        Stopped: it came.
    """
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        raise KeyboardInterrupt  # what waits in the body takes other exceptions for its own, or lets none out

    try:
        with on_sigterm(ask):
            yield
    except KeyboardInterrupt:
        if not asked.is_set():
            raise
        raise Stopped(message) from None
