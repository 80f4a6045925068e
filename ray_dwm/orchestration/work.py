"""The hidden folder beside an output, in which unfinished work survives an interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ray_dwm.data.records import LOCK, locked, read_json, write_whole
from ray_dwm.errors import Stopped, UserError

SHARDS = "shards"
"""In it, what becomes the output."""
PROXIES = "proxy_seconds"
"""What `timed` calls the seconds that went into training proxy LMs, which other selections use too."""


def work_path(output: Path) -> Path:
    """Where the work for an output lies."""
    return output.with_name(f".{output.name}.work")


@contextmanager
def work_folder(output: Path, depends_on: Mapping[str, Any]) -> Iterator[Path]:
    """What is kept until the body has ended well; what other work for the same output has left there goes.

    Processes that make the same output take turns.

    Args:
        depends_on: all that the work depends on.

    Raises:
        Stopped: the body was interrupted.
        UserError: there is no space or no permission.
    """
    try:
        with _claimed(output, depends_on) as work:
            yield work
    except KeyboardInterrupt:
        raise Stopped(f"{output} interrupted: the same command continues from its finished blocks") from None
    except BrokenPipeError:  # who reads what is printed has gone
        raise
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror or error}): free space, or choose another place; the same "
            "command continues"
        ) from None


@contextmanager
def timed(work: Path, what: str = "seconds") -> Iterator[Callable[[], float]]:
    """Seconds that work has taken, with those of earlier attempts that were interrupted (but not killed)."""
    path, before, began = work / what, spent(work, what), time.monotonic()
    try:
        yield lambda: before + time.monotonic() - began
    finally:
        work.mkdir(parents=True, exist_ok=True)
        write_whole(path, str(before + time.monotonic() - began))


def spent(work: Path, what: str) -> float:
    """The seconds that `timed` has counted."""
    path = work / what
    return float(path.read_text()) if path.exists() else 0.0


@contextmanager
def _claimed(output: Path, depends_on: Mapping[str, Any]) -> Iterator[Path]:
    work, content = work_path(output), json.dumps(depends_on)
    work.mkdir(parents=True, exist_ok=True)
    waiting = partial(print, f"another process is at work on {output}: waiting for it", flush=True)
    with locked(work / LOCK, waiting):
        work.mkdir(exist_ok=True)  # who was waited for has removed it
        key = work / "key.json"
        if not key.exists() or read_json(key) != json.loads(content):
            for path in work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        (work / SHARDS).mkdir(exist_ok=True)
        write_whole(key, content)
        yield work
        shutil.rmtree(work, ignore_errors=True)
