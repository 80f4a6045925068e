"""One live line about a running run, read from its metrics.jsonl; plain lines where there is no terminal."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ray_dwm.config import RunConfig
from ray_dwm.engine.messages import MESSAGES
from ray_dwm.logs import in_json, say

_POLL_S = 0.5
_PLAIN_INTERVAL_S = 10.0
_TOLD = ("step", "tokens", "loss", "tokens_per_s", "dwm/ess", "dwm/version")
"""Fields of a line for collectors."""


class Progress:
    """A context in which the driver shows how far the workers are."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._path = config.run_dir / "metrics.jsonl"
        self._messages = config.run_dir / MESSAGES
        self._told = self._messages.stat().st_size if self._messages.exists() else 0
        """Bytes of what the workers have said that were there before, or have been passed on."""
        self._live = sys.stdout.isatty() and not in_json()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._shown_step = -1
        self._last_plain = 0.0

    def __enter__(self) -> Progress:
        cluster = self._config.cluster
        number = f"{cluster.least_workers} to {cluster.most_workers}" if cluster.elastic else cluster.most_workers
        say(f"starting {number} workers", run=self._config.name)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            print()

    def _watch(self) -> None:
        rates: list[float] = []
        while not self._stop.wait(_POLL_S):
            self._show(rates)
        self._last_plain = 0.0
        self._show(rates)

    def _pass_on(self) -> None:
        """Print what the workers have said since the last look."""
        whole = b""
        # None yet; or a network file system fails for a while: the next look may be better, and this thread must live.
        with suppress(OSError), self._messages.open("rb") as stream:
            stream.seek(self._told)
            whole = stream.read().rpartition(b"\n")[0]
        if whole:
            self._told += len(whole) + 1
            if self._live:
                print("\r\x1b[K", end="")
            for line in whole.decode(errors="replace").split("\n"):
                say(line.removeprefix(f"[{self._config.name}] "), run=self._config.name)

    def _show(self, rates: list[float]) -> None:
        self._pass_on()
        line = last_line(self._path)
        if line is None or line["step"] == self._shown_step or "loss" not in line:
            return
        due = time.monotonic() - self._last_plain >= _PLAIN_INTERVAL_S
        if not self._live and not due:
            return
        self._shown_step, self._last_plain = int(line["step"]), time.monotonic()
        rates.append(line["tokens_per_s"])
        del rates[:-20]
        text = self._text(line, sum(rates) / len(rates))
        if self._live:
            print(f"\r\x1b[K[{self._config.name}] {text}", end="", flush=True)
        else:
            say(text, run=self._config.name, **{key: line[key] for key in _TOLD if key in line})

    def _text(self, line: dict[str, Any], rate: float) -> str:
        steps = self._config.train.steps
        left = (steps - line["step"]) * line["tokens"] / line["step"] / rate
        text = (
            f"step {line['step']}/{steps}  loss {line['loss']:.3f}  {rate:,.0f} tokens/s  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        if "dwm/ess" in line:
            text += f"  ESS {line['dwm/ess'] / self._config.train.global_batch:.0%}"
        if "dwm/version" in line:
            text += f"  DWM v{line['dwm/version']}"
        return text


def last_line(path: Path) -> dict[str, Any] | None:
    """The last line of a metrics.jsonl that grows; None where there is none, or it is being written."""
    try:
        with path.open("rb") as stream:
            return _tail(stream)
    except (OSError, ValueError):
        return None


def _tail(stream: IO[bytes]) -> dict[str, Any] | None:
    stream.seek(0, 2)
    stream.seek(max(0, stream.tell() - 16384))
    lines = stream.read().decode(errors="replace").rstrip("\n").rsplit("\n", 1)
    return dict(json.loads(lines[-1])) if lines[-1] else None
