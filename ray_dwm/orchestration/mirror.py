"""A copy of the run folder at an address (`mirror`), for storage that goes with its machine.

The folder is what a run works in; the mirror is written to, and read only where the folder is gone. A checkpoint's
table of contents is copied last, when all that it speaks of and all that was logged before it are there: what comes
back is always a state from which the run can continue.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from types import TracebackType

import pyarrow as pa
from pyarrow import fs

from ray_dwm.config import RunConfig
from ray_dwm.engine.messages import note, say
from ray_dwm.engine.rundir import RUNNING, STOP
from ray_dwm.engine.saved import CONTENTS, list_checkpoints, step_of
from ray_dwm.errors import ConfigError, UserError, first_line
from ray_dwm.logs import say as tell

_CONFIG, _SUMMARY, _CHECKPOINTS = "config.yaml", "summary.json", "checkpoints/"
_PASSING = {STOP, RUNNING}
_POLL_S = 5.0
_LOG_S = 60.0
"""How old the copy of what is logged between two checkpoints may become."""
_THREADS = 8
_CHUNK = 8 * 2**20
_LOCAL = fs.LocalFileSystem()
_ERRORS = (OSError, pa.ArrowException)

Sign = tuple[int, int]
"""Size and time of the last change in ns."""
_OTHER = (-1, 0)
"""Of a file that is there, and not as it is here."""


def prepare_mirror(config: RunConfig) -> None:
    """Try the mirror, and take the run folder from there where it is gone.

    Raises:
        UserError: the mirror cannot be opened, written or read, or is further than the folder.
    """
    if config.mirror:
        prove(config)
        _restore(config)


class Mirror:
    """A context in which the run folder is copied as it grows; what fails is said, tried again, and stops nothing."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._folder, self._sent = config, config.run_dir, dict[str, Sign]()
        self._told, self._stop = "", threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Mirror:
        if self._config.mirror:
            self._store, self._root = _open(self._config)
            try:
                self._sent = self._there()
            except _ERRORS as error:
                raise UserError(f"mirror {self._config.mirror} cannot be read: {first_line(error)}") from None
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._config.mirror:
            return
        self._stop.set()
        self._thread.join()
        try:
            self.copy()
        except _ERRORS as failure:
            with suppress(OSError):
                say(self._folder, f"{self._config.mirror} lacks what was written last: {first_line(failure)}")

    def copy(self) -> None:
        """Bring the mirror up to date.

        Raises:
            OSError, pyarrow.ArrowException: it cannot be written; what is there is whole.
        """
        now = _files(self._folder)
        new = [path for path, sign in now.items() if self._sent.get(path) != sign]
        parts = [path for path in new if path.startswith(_CHECKPOINTS) and not _is_contents(path)]
        self._drop(_contents_of(path) for path in parts)  # what is replaced is no checkpoint meanwhile
        pruned = {_contents_of(path) for path in self._send(parts, now)}
        self._send([path for path in new if not path.startswith(_CHECKPOINTS) and path != _SUMMARY], now)
        contents = [path for path, sign in now.items() if _is_contents(path) and self._sent.get(path) != sign]
        self._send([path for path in contents if path not in pruned], now)
        gone = self._sent.keys() - now.keys()
        self._drop(path for path in gone if _is_contents(path))
        self._drop(gone)
        self._send([path for path in new if path == _SUMMARY], now)

    def _send(self, paths: Iterable[str], signs: dict[str, Sign]) -> list[str]:
        """Copy files; those that are gone meanwhile are returned."""
        with ThreadPoolExecutor(_THREADS) as pool:
            there = list(pool.map(self._send_one, paths := list(paths)))
        sent = [path for path, is_there in zip(paths, there, strict=True) if is_there]
        self._sent.update((path, signs[path]) for path in sent)
        return [path for path in paths if path not in sent]

    def _send_one(self, path: str) -> bool:
        source, target = self._folder / path, f"{self._root}/{path}"
        try:
            self._store.create_dir(target.rpartition("/")[0])
            fs.copy_files(str(source), target, _LOCAL, self._store, chunk_size=_CHUNK)
        except _ERRORS:
            if source.exists():
                raise
            return False
        return True

    def _drop(self, paths: Iterable[str]) -> None:
        for path in set(paths) & self._sent.keys():
            self._store.delete_file(f"{self._root}/{path}")
            del self._sent[path]

    def _there(self) -> dict[str, Sign]:
        """What of the folder is there already, of the same size and not older; and what is to be replaced or to go."""
        now, listing = _files(self._folder), _listing(self._store, self._root)
        # Those that the folder has not were pruned before a kill: they count as sent, so that they are dropped.
        found = {path: info for path, info in listing.items() if path in now or path.startswith(_CHECKPOINTS)}
        same = {
            path
            for path, info in found.items()
            if path in now and info.size == now[path][0] and (info.mtime_ns or 0) >= now[path][1]
        }
        return {path: now[path] if path in same else _OTHER for path in found}

    def _watch(self) -> None:
        seen: list[Path] = []
        waited = 0.0
        while not self._stop.wait(_POLL_S):
            waited += _POLL_S
            try:
                found = list_checkpoints(self._folder / "checkpoints")
                if found == seen and waited < _LOG_S:
                    continue
                waited = 0.0
                self.copy()
                seen, self._told = found, ""
            except Exception as error:  # as of a network that is away for a while: the next look may be better
                before, self._told = self._told, f"{self._config.mirror} cannot be written: {first_line(error)}"
                if self._told != before:
                    with suppress(OSError):  # it may be the folder that is away
                        note(self._folder, self._told)


def _restore(config: RunConfig) -> None:
    store, root = _open(config)
    there = _listing(store, root)
    steps = [step_of(Path(path).parent) for path in there if _is_contents(path)]
    local = [step_of(path) for path in list_checkpoints(config.run_dir / "checkpoints")]
    if (config.run_dir / _CONFIG).is_file():
        if max(steps, default=0) > max(local, default=0):
            raise UserError(
                f"mirror {config.mirror} holds step {max(steps)} of {config.name}, run folder {config.run_dir} only "
                f"step {max(local, default=0)}: remove the folder to continue from the mirror, or choose another "
                "name=... or mirror=..."
            )
        return
    if _CONFIG not in there:
        return
    whole = {path for path in there if not path.startswith(_CHECKPOINTS) or _contents_of(path) in there}
    fresh = config.run_dir.parent / f".{config.name}.{secrets.token_hex(4)}"

    def fetch(path: str) -> None:
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(f"{root}/{path}", str(fresh / path), store, _LOCAL, chunk_size=_CHUNK)
        if (changed := there[path].mtime_ns) is not None:
            os.utime(fresh / path, ns=(changed, changed))  # else all of it would be copied back

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, whole))
        fresh.rename(config.run_dir)
    except _ERRORS as error:
        raise UserError(
            f"run folder {config.run_dir} cannot be taken from mirror {config.mirror}: {first_line(error)}"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    tell(f"run folder {config.run_dir} comes from {config.mirror}, step {max(steps, default=0)}", run=config.name)


def prove(config: RunConfig) -> None:
    """Write, read and remove a file, as every later copy will be.

    Raises:
        UserError: one of them cannot be done.
    """
    store, root = _open(config)
    token = secrets.token_hex(8)
    path = f"{root}.proof-{token}"
    try:
        store.create_dir(path.rpartition("/")[0])
        with store.open_output_stream(path) as stream:
            stream.write(token.encode())
        with store.open_input_stream(path) as stream:
            same = stream.read() == token.encode()
        store.delete_file(path)
    except _ERRORS as error:
        raise UserError(
            f"mirror {config.mirror} cannot be written and read ({first_line(error)}): see to its address, rights and "
            "credentials, or leave mirror= out"
        ) from None
    if not same:
        raise UserError(f"mirror {config.mirror} does not give back what was written: choose another mirror=...")


def _open(config: RunConfig) -> tuple[fs.FileSystem, str]:
    """The file system, and the run's folder there."""
    try:
        store, root = fs.FileSystem.from_uri(f"{config.mirror.rstrip('/')}/{config.name}")
    except (*_ERRORS, ImportError, ValueError) as error:
        raise ConfigError(
            f"mirror is {config.mirror!r}, which pyarrow cannot open ({first_line(error)}): name a folder, as "
            "s3://bucket/runs, gs://bucket/runs, or fsspec+PROTOCOL://... for what fsspec knows"
        ) from None
    return store, root


def _files(folder: Path) -> dict[str, Sign]:
    """Relative path -> sign of all that is to be copied; of checkpoints the whole ones."""
    whole = {path.name for path in list_checkpoints(folder / "checkpoints")}
    found: dict[str, Sign] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if _is_copied(name, whole):
            with suppress(FileNotFoundError):
                stat = path.stat()
                if S_ISREG(stat.st_mode):
                    found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def _is_copied(name: str, whole: set[str]) -> bool:
    parts = name.split("/")
    if parts[0] == "checkpoints" and parts[1:] and parts[1] not in whole:
        return False
    passing = any(part.startswith(".") or part.endswith(".tmp") for part in parts) or name in _PASSING
    return _is_contents(name) or not passing


def _listing(store: fs.FileSystem, root: str) -> dict[str, fs.FileInfo]:
    """Relative path -> what is known of each file of a run in the mirror."""
    infos = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return {info.path[len(root) + 1 :]: info for info in infos if info.type == fs.FileType.File}


def _is_contents(path: str) -> bool:
    return path.startswith(_CHECKPOINTS) and path.endswith(f"/{CONTENTS}")


def _contents_of(path: str) -> str:
    """The table of contents of the checkpoint that a file is of."""
    return f"{'/'.join(path.split('/')[:2])}/{CONTENTS}"
