"""Small files that runs leave behind: written whole or not at all, read back with one clear line if damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ray_dwm.errors import DataError, UserError
from ray_dwm.logs import in_job, say

LOCK = ".lock"
"""In a folder that one process at a time works in; see `locked`."""
_FORMER_S = 300.0
"""For so long, the attempt that a Ray job follows may still save: Kubernetes lets the head's pod live no longer."""
_POLL_S = 1.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, of no other process or host, that takes the place of `path` when the body has ended well."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Hold a lock file, among all processes and hosts that see it, for as long as the body runs.

    A file system without locks lets everyone in.

    Args:
        busy: called once where another process holds it: raises, or says so and waits.
    """
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file; asked with a lock of a moment that leaves nothing."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no such file, or a file system without locks
    return False


def outlive(lock: Path, within_s: float) -> bool:
    """Wait a while for whoever holds a lock file to end; whether it is free then is returned."""
    deadline = time.monotonic() + within_s
    while is_locked(lock):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder for as long as the body runs.

    A Ray job waits a while for one that is there: it may be the attempt before it, which has been told to end.

    Args:
        what: the folder is.

    Raises:
        UserError: another process is in it.
    """
    with locked(folder / LOCK, lambda: _refuse(folder, what)):
        yield


def _refuse(folder: Path, what: str) -> None:
    told = f"{what} {folder} is in use by another process"
    if in_job():
        say(f"{told}: waiting for up to {_FORMER_S:g} s")
        if outlive(folder / LOCK, _FORMER_S):
            return
    raise UserError(f"{told}: wait for it, or choose another name=...")


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file that appears, or replaces its forerunner, in one go."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a .npz file that appears, or replaces its forerunner, in one go."""
    named: dict[str, Any] = dict(arrays)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **named)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The named arrays of a .npz file.

    Raises:
        DataError: it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}, a finished block, is damaged ({str(error).splitlines()[0]}): remove it and start the same "
            "command again"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears, or replaces its forerunner, in one go."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        DataError: where it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged ({reason}): remove it and start the same command again") from None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl; a last line that a crash cut is left out.

    Raises:
        DataError: where another line is damaged.
    """
    texts = path.read_text(errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            if number < len(texts):
                raise DataError(f"{path}: line {number} is damaged, restore or remove it") from None
    return lines
