"""A checkpoint is whole or not there, and is passed over where it is damaged or of another run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from checkpointing import OPTIONS, checkpointer, names, save
from gloo import run, run_all
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.engine import storage
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.engine.setup import build
from ray_dwm.errors import ConfigError, TrainingError


def saved_and_loaded(config: RunConfig, steps: tuple[int, ...]) -> tuple[list[str], int, int]:
    save(checkpointer(config), *steps)
    step, cursor = checkpointer(config).load_latest()
    return names(config), step, cursor.batches


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("checkpoint.keep=2",), [4, 5]),
        (("checkpoint.keep=1", "checkpoint.asynchronous=false"), [5]),
        (("checkpoint.keep=1", "checkpoint.keep_every=2"), [0, 2, 4, 5]),
    ],
)
def test_keeps_the_newest_and_restores_step_and_cursor(
    shards: dict[str, Path], tmp_path: Path, options: tuple[str, ...], kept: list[int]
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, *options)
    found, step, cursor = run(1, tmp_path / "p", saved_and_loaded, config, tuple(range(6)))
    assert found == [f"step_{kept_step:09d}" for kept_step in kept]
    assert (step, cursor) == (5, 15)


def half_written(config: RunConfig) -> tuple[list[str], int]:
    save(checkpointer(config), 1)
    folder = config.run_dir / "checkpoints"
    shutil.copytree(folder / "step_000000001", folder / "step_000000005.tmp")
    shutil.copytree(folder / "step_000000001", folder / "step_000000007")
    (folder / "step_000000007" / ".metadata").unlink()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000000001"]
    step, _ = checkpointer(config).load_latest()
    return names(config), step


def test_half_written_checkpoints_are_no_checkpoints_and_go(shards: dict[str, Path], tmp_path: Path) -> None:
    found, step = run(1, tmp_path / "p", half_written, tiny_config(shards, tmp_path, *OPTIONS))
    assert step == 1
    assert found == ["step_000000001", "step_000000007"]


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def cut(checkpoint: Path, mark: Path) -> None:
    file = sorted(checkpoint.glob("*.distcp"))[-1]
    file.write_bytes(file.read_bytes()[:2000])


def flip(checkpoint: Path, mark: Path) -> None:
    """Of the right length, but no longer readable."""
    file = sorted(checkpoint.glob("*.distcp"))[-1]
    file.write_bytes(bytes(len(file.read_bytes())))


def drop(checkpoint: Path, mark: Path) -> None:
    sorted(checkpoint.glob("*.distcp"))[-1].unlink()


def garble(checkpoint: Path, mark: Path) -> None:
    content = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(content[: len(content) // 2])


def poison(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))


def unname(checkpoint: Path, mark: Path) -> None:
    (checkpoint / "identity.json").write_text("{")


def load_spoiled(config: RunConfig, spoil: Callable[[Path, Path], None], mark: Path, all_of_them: bool) -> Any:
    """What loading does when the newest of two checkpoints, or both, were spoiled."""
    parts = build(config)
    subject = checkpointer(config, parts)
    first = [p.full_tensor().clone() for p in parts.lower.model.parameters()]  # type: ignore[attr-defined]
    save(subject, 1)
    with torch.no_grad():
        for p in parts.lower.model.parameters():
            p.add_(1.0)
    save(subject, 2)
    folder = config.run_dir / "checkpoints"
    if dist.get_rank() == 0:
        for path in list_checkpoints(folder)[0 if all_of_them else 1 :]:
            spoil(path, mark)
    dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            step, _ = subject.load_latest()
        except TrainingError as error:
            return str(error), names(config)
    now = [p.full_tensor() for p in parts.lower.model.parameters()]  # type: ignore[attr-defined]
    restored = all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
    return step, restored, said.getvalue(), names(config)


SPOILT: list[tuple[Callable[[Path, Path], None], int, str]] = [
    (cut, 2, ".distcp has 2000 of "),
    (flip, 2, ""),
    (drop, 2, ".distcp is missing"),
    (garble, 1, ".metadata cannot be read: pickle data was truncated"),
    (poison, 1, ".metadata cannot be read: it holds pathlib.Path.touch"),
    (unname, 1, "identity.json is missing or cannot be read"),
]


@pytest.fixture(scope="module")
def spoilt(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Any]]:
    """Damage -> (configuration, `load_spoiled`)."""
    folder, calls = tmp_path_factory.mktemp("spoilt"), {}
    for spoil, world, _ in SPOILT:
        config = tiny_config(shards, folder / spoil.__name__, *OPTIONS, f"cluster.workers={world}")
        calls[spoil.__name__] = (world, config, spoil, config.run_dir / "mark", False)
    found = run_all(folder, load_spoiled, calls)
    return {name: (call[1], found[name]) for name, call in calls.items()}


@pytest.mark.parametrize(("spoil", "reason"), [(spoil.__name__, reason) for spoil, _, reason in SPOILT])
def test_a_damaged_or_hostile_checkpoint_is_passed_over_and_kept_aside(
    spoilt: dict[str, tuple[RunConfig, Any]], spoil: str, reason: str
) -> None:
    config, (step, restored, said, found) = spoilt[spoil]
    assert (step, restored) == (1, True)
    assert found == ["step_000000001", "step_000000002.damaged"]
    assert said.startswith(f"[{config.name}] warning: checkpoint step_000000002 is damaged (") and reason in said
    assert said.endswith("), kept as step_000000002.damaged: continuing from step 1\n") and said.count("\n") == 1
    assert not (config.run_dir / "mark").exists()


def test_where_none_is_good_the_run_does_not_start_anew(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS)
    message, found = run(1, tmp_path / "p", load_spoiled, config, cut, tmp_path / "mark", True)
    assert message.startswith(f"no checkpoint in {config.run_dir / 'checkpoints'} is good (step_000000002: ")
    assert "step_000000001: " in message and "\n" not in message
    assert found == ["step_000000001", "step_000000002"]


def sees_late(config: RunConfig, after_s: float, limit_s: float) -> tuple[int, str, list[str], str]:
    """What loading does where rank 1 sees the newest checkpoint only after a while, as on a network file system."""
    subject, step, message = checkpointer(config), 0, ""
    save(subject, 1, 2)
    start, ordinary = time.monotonic(), storage.damage

    def late(checkpoint: Path) -> str | None:
        lagging = dist.get_rank() == 1 and checkpoint.name == "step_000000002" and time.monotonic() - start < after_s
        return ".metadata is missing" if lagging else ordinary(checkpoint)

    waits = patch.multiple(storage, SIGHT_LIMIT_S=limit_s, _SAID_AFTER_S=0.1, _POLL_S=0.05, damage=late)
    with waits, patch.dict(os.environ, LOCAL_RANK="0"):  # the ranks are on nodes of their own
        try:
            step, _ = subject.load_latest()
        except TrainingError as error:
            message = str(error)
    dist.barrier()
    return step, message, names(config), (config.run_dir / "messages.log").read_text()


@pytest.fixture(scope="module")
def seen(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[RunConfig, Any]]:
    """Whether the checkpoint comes into sight -> (configuration, `sees_late`)."""
    folder, calls = tmp_path_factory.mktemp("seen"), {}
    for comes, times in ((True, (0.5, 60.0)), (False, (60.0, 0.5))):
        options = (*OPTIONS, "cluster.workers=2", "weighting.method=uniform")
        calls[comes] = (2, tiny_config(shards, folder / str(comes), *options), *times)
    found = run_all(folder, sees_late, calls)
    return {comes: (call[1], found[comes]) for comes, call in calls.items()}


@pytest.mark.parametrize("comes", [True, False])
def test_a_rank_that_sees_a_checkpoint_late_does_not_condemn_it(
    seen: dict[bool, tuple[RunConfig, Any]], comes: bool
) -> None:
    config, (step, message, found, said) = seen[comes]
    assert found == ["step_000000001", "step_000000002"], "nothing was put aside"
    assert "until rank 1 on node" in said and "sees step_000000002 as rank 0 does (.metadata is missing)" in said
    if comes:
        assert (step, message) == (2, "")
    else:
        assert message.startswith(f"checkpoint {config.run_dir / 'checkpoints' / 'step_000000002'} is good on rank 0")
        assert "(rank 1 on node " in message and "must lie on storage that all nodes share" in message


def load_other(config: RunConfig, other: RunConfig) -> tuple[str, list[str]]:
    save(checkpointer(config), 1, 2)
    with pytest.raises(ConfigError) as raised:
        checkpointer(other).load_latest()
    return str(raised.value), names(config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.optimizer=sgd,train.momentum=0.9", "train.optimizer is adamw there and sgd here"),
        ("lm.preset=quickstart", "lm.width is 32 there and 96 here"),
        ("dwm.size=s", "dwm.width is 32 there and 64 here"),
        ("weighting.method=uniform", "weighting.method is dwm there and uniform here"),
        ("dwm.delay_steps=5", "Missing key in checkpoint state_dict: weighting.2."),
    ],
)
def test_a_checkpoint_of_another_run_is_no_damage(
    shards: dict[str, Path], tmp_path: Path, change: str, told: str
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS)
    message, found = run(
        1, tmp_path / "p", load_other, config, tiny_config(shards, tmp_path, *OPTIONS, *change.split(","))
    )
    assert message.startswith(f"checkpoint {config.run_dir / 'checkpoints' / 'step_000000002'} is of another run (")
    assert told in message and "choose another name=..." in message and "\n" not in message
    assert found == ["step_000000001", "step_000000002"]
