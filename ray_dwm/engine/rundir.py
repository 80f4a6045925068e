"""The run folder: who may write into it, and what says that the run is over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_dwm.config import RunConfig, load, to_dict, to_yaml
from ray_dwm.config.building import dotted
from ray_dwm.data.manifest import MANIFEST, file_sha256
from ray_dwm.data.records import alone_in, read_json, write_whole
from ray_dwm.engine.reference import reference_weights
from ray_dwm.errors import ConfigError, DataError, DwmError, TrainingError, UserError

STOP, RUNNING = "stop", "running"
"""Files by which driver and workers talk while they live."""
_DATA = "data.json"

# What may differ when a run is resumed: where and on what it runs, not what it computes.
_FREE = ("storage", "mirror", "cluster", "parallel", "tracking", "prepare", "selection", "checkpoint", "evaluation")
_FREE_KEYS = ("train.micro_batch", "train.profile", "train.profile_first", "train.profile_steps")

_CHOICE = ("selection.mates.", "selection.budget", "selection.temperature", "selection.stratified")
"""Of a run that chooses its data itself; what is selected before a run is what its data are."""


def check(config: RunConfig) -> None:
    """Make sure that the run folder can be made, or is of the same configuration; writes nothing.

    Raises:
        ConfigError: naming the first key that differs.
        UserError: the folder's place cannot be written.
    """
    path = config.run_dir / "config.yaml"
    if path.is_file():
        before, now = dotted(_stored(path)), dotted(to_dict(config))
        for key in sorted(before.keys() | now.keys()):
            moved = _is_set(key) and before.get(key) and now.get(key)  # its content is compared, wherever it lies
            if not (moved or is_free(key, config)) and before.get(key) != now.get(key):
                raise ConfigError(
                    f"run folder {config.run_dir} was made with {key} = {before.get(key)}, now it is {now.get(key)}: "
                    "choose another name=..., or remove the folder"
                )
    _check_data(config)
    place = next(folder for folder in (config.run_dir, *config.run_dir.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"run folder {config.run_dir} cannot be written: choose another storage=...")


def _is_set(key: str) -> bool:
    return key in ("data.train", "data.target") or key.startswith(("data.more_targets.", "data.held_out."))


def is_free(key: str, config: RunConfig) -> bool:
    """Whether a dotted key may differ when the run is continued."""
    if config.in_stages and key.startswith(_CHOICE):
        return False
    return key.split(".")[0] in _FREE or key in _FREE_KEYS


@contextmanager
def claim(config: RunConfig) -> Iterator[None]:
    """Create or take over the run folder, and keep a second process out of it for as long as the body runs.

    Raises:
        UserError: another process is training this run.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run folder {config.run_dir} cannot be made ({error.strerror}): choose another storage=..."
        ) from None
    with alone_in(config.run_dir, "run folder"):
        check(config)  # again, now that nobody else can change it
        write_whole(config.run_dir / "config.yaml", to_yaml(config))
        write_whole(config.run_dir / _DATA, json.dumps(data_digests(config), indent=2) + "\n")
        failure_path(config).unlink(missing_ok=True)
        stop_path(config).unlink(missing_ok=True)
        running_path(config).unlink(missing_ok=True)
        yield


def _stored(path: Path) -> dict[str, Any]:
    try:
        return to_dict(load([path]))
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged ({error}): choose another name=..., or remove the folder") from None


def data_digests(config: RunConfig) -> dict[str, str]:
    """Name of every set -> SHA-256 of its manifest, and so of all its shards; and of a DWM that is given."""
    data = config.data
    sets = {"train": data.train, "target": data.target, **data.more_targets, **data.held_out}
    files = {name: Path(folder).expanduser() / MANIFEST for name, folder in sets.items() if folder}
    if config.dwm.init_from:
        files["dwm.init_from"] = Path(config.dwm.init_from).expanduser() / "model.safetensors"
    if config.dwm.trajectory:
        files["dwm.trajectory"] = Path(config.dwm.trajectory).expanduser() / "trajectory.json"
    if (reference := reference_weights(config)) is not None:
        files["weighting.group_dro.reference"] = reference
    return {name: file_sha256(path) for name, path in files.items()}


def _check_data(config: RunConfig) -> None:
    path = config.run_dir / _DATA
    if not path.is_file():
        return
    before, now = read_json(path), data_digests(config)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            raise DataError(
                f"the shards of {name} are not those that run folder {config.run_dir} was made with: restore them, "
                "choose another name=..., or remove the folder"
            )


def failure_path(config: RunConfig) -> Path:
    """Where a worker leaves the reason why restarting is not what is wanted."""
    return config.run_dir / "failure.json"


def stop_path(config: RunConfig) -> Path:
    """A file by which the driver asks the workers to save a checkpoint and end."""
    return config.run_dir / STOP


def running_path(config: RunConfig) -> Path:
    """A file that is there while workers run, and so can do what `stop_path` asks for."""
    return config.run_dir / RUNNING


def record_failure(config: RunConfig, error: DwmError, where: str = "") -> None:
    """Leave the reason for an end before the end; the first one stays.

    Args:
        where: who met it.
    """
    path = failure_path(config)
    if not path.exists():
        message = f"{error} ({where})" if where else str(error)
        write_whole(path, json.dumps({"message": message, "exit_code": error.exit_code, "kind": error.kind}))


def raise_failure(config: RunConfig) -> None:
    """Raise what a worker left, if it did; always as a failure of the running run."""
    path = failure_path(config)
    if path.exists():
        left = read_json(path)
        error = TrainingError(left["message"])
        error.kind = left["kind"]
        raise error


def read_summary(config: RunConfig) -> dict[str, Any] | None:
    """The final figures, or None where the run is not complete."""
    path = config.run_dir / "summary.json"
    return read_json(path) if path.is_file() else None
