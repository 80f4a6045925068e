"""What each worker leaves in the run folder while it trains, so that the first one that fails can be named.

A process that is killed says nothing: where it ran and what memory it held is known from its last beat.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from ray_dwm import logs
from ray_dwm.config import RunConfig
from ray_dwm.data.records import write_whole
from ray_dwm.engine.mesh import device
from ray_dwm.orchestration.exporting import Exporter, resident_bytes
from ray_dwm.orchestration.progress import last_line

BEAT_S = 10.0
_LOST_S = 3 * BEAT_S
"""Without a beat for so long, a worker is gone."""

_HINTS = (
    (r"CUDA out of memory", "lower train.micro_batch, or set parallel.activation_checkpointing or parallel.loss_chunk"),
    (
        r"low on memory|OutOfMemory",
        "give the nodes more memory, or place fewer workers on each (cluster.cpus_per_worker)",
    ),
    (
        r"process has died|SIGKILL|died unexpectedly",
        "something killed the process, most often for memory: look at dmesg, or at `kubectl describe pod`",
    ),
    (r"ModuleNotFoundError|ImportError", "the nodes differ: `ray-dwm doctor` compares them"),
    (
        r"Connection (reset|closed|refused)|NCCL|[Tt]imed? ?out",
        "the network between the nodes, or a rank that hangs: `ray-dwm doctor` tries the process group",
    ),
)
_NO_HINT = "the traceback is in that worker's log in the Ray dashboard"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What is known of a worker."""

    attempt: int
    rank: int
    node: str
    pid: int
    memory_bytes: int
    node_used_bytes: int
    node_bytes: int
    """Of the container, where there is one."""
    step: int = 0
    """Steps that were done; of an attempt that did not come as far, 0."""
    error: str = ""
    """Where it ended with one: its type and first line."""
    time_s: float = 0.0

    def __str__(self) -> str:
        held, used, whole = (x / 2**30 for x in (self.memory_bytes, self.node_used_bytes, self.node_bytes))
        # An attempt that continues a run and did not get to load its checkpoint has not lost that run's steps.
        when = f"after step {self.step}" if self.step else f"before the first step of attempt {self.attempt}"
        return (
            f"rank {self.rank} on {self.node}, {when}, holding {held:.1f} GiB of memory, {used:.1f} of "
            f"{whole:.1f} GiB there in use"
        )


def hint(error: str) -> str:
    """What to do about an error that is not this package's own."""
    return next((told for pattern, told in _HINTS if re.search(pattern, error)), _NO_HINT)


class Watch:
    """A context in which a worker trains: it exports its memory, and writes it down with the place and the step."""

    def __init__(self, config: RunConfig, attempt: int, rank: int, exporter: Exporter) -> None:
        self._folder, self._attempt, self._rank, self._exporter = config.run_dir, attempt, rank, exporter
        self._node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def failed(self, error: Exception) -> Beat:
        """This worker ends with an error: write that down, too, and tell collectors."""
        self._ended.set()
        self._thread.join()
        beat = replace(self.look(), error=f"{type(error).__name__}: {_first_line(error)}")
        self._write(beat)
        logs.record(str(error), error, node=beat.node, memory_bytes=beat.memory_bytes, hint=hint(beat.error))
        return beat

    def look(self) -> Beat:
        """This worker now."""
        return Beat(
            attempt=self._attempt,
            rank=self._rank,
            node=self._node,
            pid=os.getpid(),
            memory_bytes=resident_bytes(),
            node_used_bytes=get_used_memory(),
            node_bytes=get_system_memory(),
            step=int(logs.bound("step") or 0),
            time_s=time.time(),
        )

    def _beat_on(self) -> None:
        while True:
            beat = self.look()
            self._write(beat)
            self._exporter.put("lm_worker_memory_bytes", beat.memory_bytes)
            if torch.cuda.is_available():
                # Of its own GPU by name: a new thread starts at the node's first one.
                self._exporter.put("lm_worker_gpu_memory_bytes", torch.cuda.max_memory_allocated(device()))
            if self._ended.wait(BEAT_S):
                return

    def _write(self, beat: Beat) -> None:
        with suppress(OSError):  # a full disk is told where something is lost by it
            path = _folder(self._folder) / f"rank-{beat.rank:05d}.json"
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(asdict(beat)))


def _folder(run_dir: Path) -> Path:
    return run_dir / "workers"


def next_attempt(run_dir: Path) -> int:
    """Count one more start of the worker group on a run folder, from 1; by one rank."""
    path = run_dir / "attempts"
    number = 1
    with suppress(OSError, ValueError):
        number = int(path.read_text()) + 1
    with suppress(OSError):  # of a full disk the checkpoint tells
        write_whole(path, f"{number}\n")
    return number


def first_failure(run_dir: Path, failures: Mapping[int, BaseException]) -> str:
    """The failure that came first, with rank, node, memory, step and a hint: the others follow from it.

    Args:
        failures: rank -> error, as Ray Train tells them.
    """
    if not failures:
        return ""
    beats = _newest(run_dir)
    died = [rank for rank, error in failures.items() if _died(error)]
    told = sorted((beat for beat in beats.values() if beat.error), key=lambda beat: beat.time_s)
    rank = min(died) if died else (told[0].rank if told else min(failures))
    beat, error = beats.get(rank), failures.get(rank)
    said = beat.error if beat is not None and beat.error else last_words(error)
    if beat is not None and not beat.error and (line := last_line(run_dir / "metrics.jsonl")) is not None:
        beat = replace(beat, step=int(line["step"]))  # its last beat is older
    who = f"rank {rank}" if beat is None else str(beat)
    todo = hint(f"{said}\n{error}")
    fields = {} if beat is None else asdict(beat)
    logs.record("the run has failed", **{**fields, "rank": rank, "error": said, "hint": todo})
    return f"{who}, failed first: {said}; {todo}"


def _newest(run_dir: Path) -> dict[int, Beat]:
    """Rank -> the last beat of the newest attempt."""
    beats = []
    for path in _folder(run_dir).glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text())))
    newest = max((beat.attempt for beat in beats), default=0)
    return {beat.rank: beat for beat in beats if beat.attempt == newest}


def is_beating(run_dir: Path) -> bool:
    """Whether rank 0 lives, by its beats: one that was killed takes away nothing that it has left."""
    beat = _newest(run_dir).get(0)
    return beat is not None and time.time() - beat.time_s < _LOST_S


def _died(error: BaseException) -> bool:
    """Whether the process has gone without a word; its peers then meet lost connections."""
    cause: Any = getattr(error, "health_check_failure", error)
    return isinstance(cause, ray.exceptions.RayActorError)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


def last_words(error: BaseException | None) -> str:
    """The last line of an error, which in what Ray tells is the cause; its type where it says nothing."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
