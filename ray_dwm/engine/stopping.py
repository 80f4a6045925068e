"""SIGTERM as a request: the step that is being taken ends, a checkpoint is saved, and then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE_INTERVAL_S = 5.0
"""Between two looks, by all ranks together, at whether a node is about to be taken away."""


@contextmanager
def on_sigterm(ask: Callable[[], object]) -> Iterator[None]:
    """Call `ask` at a SIGTERM instead of dying of it; a second one ends the process as ever.

    Only a process's main thread may take signals: in another one, as in Ray's workers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, before)
        ask()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
