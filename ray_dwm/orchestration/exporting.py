"""Figures as Ray metrics, which every node's agent serves to Prometheus; `series.py` says which there are."""

from __future__ import annotations

import math
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import ray
from ray.util.metrics import Counter, Gauge

from ray_dwm.config import RunConfig
from ray_dwm.engine.metrics import Metrics
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.errors import Stopped, TrainingError
from ray_dwm.orchestration.series import BY_NAME, PLACE_TAGS, SERIES, Place, Series


class Exporter:
    """A context that exports one process's series, under the tags that all of them have. Ray must be connected to.

    Ray drops a gauge that is not set anew: a thread does that until the context or the process ends.
    """

    def __init__(self, place: Place, *tags: str) -> None:
        """
        Args:
            tags: values of `PLACE_TAGS[place]`, in order.
        """
        self._tags = dict(zip(PLACE_TAGS[place], tags, strict=True))
        self._metrics: dict[str, Gauge | Counter] = {}
        self._last: dict[tuple[str, ...], tuple[Gauge, float, dict[str, str]]] = {}
        """Name and values of the tags -> what a gauge was set to last."""
        self._lock = threading.Lock()  # without it, the thread might put an old value over a new one
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._set_anew, daemon=True)

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def put(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge, or add to a counter; what is not finite, which Ray would not pass on, takes the gauge away."""
        series, key, tags = BY_NAME[name], (name, *tags.values()), {**self._tags, **tags}
        with self._lock:
            if name not in self._metrics:
                kind = Gauge if series.kind == "gauge" else Counter
                self._metrics[name] = kind(name, f"{series.help} [{series.unit}]", series.all_tags)
            metric = self._metrics[name]
            self._last.pop(key, None)
            if not math.isfinite(value):
                return
            if isinstance(metric, Gauge):
                metric.set(value, tags)
                self._last[key] = metric, value, tags
                if self._thread.ident is None:
                    self._thread.start()
            elif value > 0:
                metric.inc(value, tags)

    def _set_anew(self) -> None:
        while not self._ended.wait(_anew_s()):
            with self._lock:
                for metric, value, tags in self._last.values():
                    metric.set(value, tags)


def _anew_s() -> float:
    """Half of Ray's interval: what was not set within one is not passed on, and gone after two."""
    return float(max(ray._config.metrics_report_interval_ms(), 1000)) / 2000


def find(key: str) -> tuple[Series, dict[str, str]] | None:
    """The series that shows a key of metrics.jsonl, and the tags that are part of the key."""
    if key in _PLAIN:
        return _PLAIN[key], {}
    for pattern, series in _PATTERNS:
        if match := pattern.fullmatch(key):
            return series, match.groupdict()
    return None


def _pattern(key: str) -> re.Pattern[str]:
    before, tag, after = re.split(r"[{}]", key)
    return re.compile(f"{re.escape(before)}(?P<{tag}>.+){re.escape(after)}")


_PLAIN = {series.key: series for series in SERIES if series.key and not series.tags}
_PATTERNS = [(_pattern(series.key), series) for series in SERIES if series.key and series.tags]


class RaySink:
    """A MetricSink: rank 0's line of metrics.jsonl as Ray metrics."""

    def __init__(self, config: RunConfig, exporter: Exporter, queue: Callable[[], int]) -> None:
        """
        Args:
            queue: how many updates have been sent to the actor and are not fetched.
        """
        self._exporter, self._queue, self._batch = exporter, queue, config.train.global_batch
        self._learns = config.learns_dwm
        self._found: dict[str, tuple[Series, dict[str, str]] | None] = {}
        newest = list_checkpoints(config.run_dir / "checkpoints")[-1:]
        self.checkpoint(newest[0].stat().st_mtime if newest else time.time())

    def log(self, metrics: Metrics) -> None:
        """See MetricSink."""
        for key, value in {**metrics, **self._derived(metrics)}.items():
            if key not in self._found:
                self._found[key] = find(key)
            if (found := self._found[key]) is not None:
                self._exporter.put(found[0].name, value, **found[1])

    def _derived(self, metrics: Metrics) -> dict[str, float]:
        """What is exported and not written down, because a line must not depend on clocks and restarts."""
        derived = {"timestamp": time.time(), "not_finite": sum(not math.isfinite(x) for x in metrics.values())}
        if metrics["step"]:
            derived["new_tokens"] = metrics["tokens"] / metrics["step"]
        if "dwm/ess" in metrics:
            derived["ess_fraction"] = (metrics["dwm/ess"] - 1) / (self._batch - 1) if self._batch > 1 else 1.0
        if self._learns:
            derived["queue"] = self._queue()
        return derived

    def checkpoint(self, time_s: float) -> None:
        """There is a checkpoint of this time."""
        self._exporter.put("lm_checkpoint_timestamp_seconds", time_s)

    def close(self, exit_code: int) -> None:
        """See MetricSink."""
        del exit_code  # what is exported ends with its exporter


def resident_bytes() -> int:
    """This process's memory; its peak where the system does not tell the present."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def active(config: RunConfig) -> Iterator[None]:
    """Export that a command trains this run, or waits for its workers; and the kind of failure that ends the body."""
    with Exporter("driver", config.name) as exporter:
        exporter.put("lm_run_active", 1)
        try:
            yield
        except TrainingError as error:
            if error.kind != Stopped.kind:
                exporter.put("lm_failures_total", 1, kind=error.kind)
            raise
        finally:
            exporter.put("lm_run_active", 0)
