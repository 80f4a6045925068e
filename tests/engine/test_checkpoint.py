"""A checkpoint is whole or not there."""

from __future__ import annotations

import pickle
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.plan import Cursor
from ray_dwm.engine.checkpoint import Checkpointer, list_checkpoints
from ray_dwm.engine.setup import build
from ray_dwm.errors import TrainingError


def checkpointer(config: RunConfig, keep: int = 2) -> Checkpointer:
    parts = build(config)
    return Checkpointer(config.run_dir / "checkpoints", keep, parts.lower, parts.weigher)


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())


def keep_two(config: RunConfig) -> tuple[list[str], int, int]:
    subject = checkpointer(config)
    for step in (0, 1, 2):
        subject.save(step, Cursor(step + 10))
    step, cursor = checkpointer(config).load_latest()
    return names(config), step, cursor.batches


def test_keeps_the_newest_and_restores_step_and_cursor(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "bilevel.warmup_steps=50", "train.steps=60")
    found, step, cursor = run(1, tmp_path / "p", keep_two, config)
    assert found == ["step_000000001", "step_000000002"]
    assert (step, cursor) == (2, 12)


def half_written(config: RunConfig) -> int:
    subject = checkpointer(config)
    subject.save(1, Cursor(1))
    folder = config.run_dir / "checkpoints"
    shutil.copytree(folder / "step_000000001", folder / "step_000000005.tmp")
    shutil.copytree(folder / "step_000000001", folder / "step_000000007")
    (folder / "step_000000007" / ".metadata").unlink()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000000001"]
    return checkpointer(config).load_latest()[0]


def test_half_written_checkpoints_are_passed_over(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "bilevel.warmup_steps=50", "train.steps=60")
    assert run(1, tmp_path / "p", half_written, config) == 1


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def cut(checkpoint: Path, mark: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:2000])


def poison(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))


def load_spoiled(config: RunConfig, spoil: Callable[[Path, Path], None], mark: Path) -> str:
    """What loading says when the newest of two checkpoints was spoiled."""
    subject = checkpointer(config)
    for step in (1, 2):
        subject.save(step, Cursor(step))
    spoil(config.run_dir / "checkpoints" / "step_000000002", mark)
    with pytest.raises(TrainingError) as raised:
        checkpointer(config).load_latest()
    return str(raised.value)


@pytest.mark.parametrize("spoil", [cut, poison])
def test_a_damaged_or_hostile_checkpoint_is_refused(shards: dict[str, Path], tmp_path: Path, spoil: Any) -> None:
    config = tiny_config(shards, tmp_path, "bilevel.warmup_steps=50", "train.steps=60")
    message = run(1, tmp_path / "p", load_spoiled, config, spoil, tmp_path / "mark")
    assert "step_000000002 is damaged" in message and "remove it to continue from step_000000001" in message
    assert "\n" not in message
    assert not (tmp_path / "mark").exists()


def write_limit(config: RunConfig) -> tuple[str, list[str], bool]:
    """Every write beyond 10 kB fails, as on a full disk."""
    subject = checkpointer(config)
    subject.save(1, Cursor(1))
    before = {p.name: p.read_bytes() for p in list_checkpoints(config.run_dir / "checkpoints")[0].iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        subject.save(2, Cursor(2))
        message = "no error"
    except TrainingError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in list_checkpoints(config.run_dir / "checkpoints")[0].iterdir()}
    return message, names(config), before == after


@pytest.mark.parametrize("world", [1, 2])
def test_a_failing_write_leaves_the_last_checkpoint(shards: dict[str, Path], tmp_path: Path, world: int) -> None:
    config = tiny_config(shards, tmp_path, f"cluster.workers={world}", "bilevel.warmup_steps=50", "train.steps=60")
    message, found, intact = run(world, tmp_path / "p", write_limit, config)
    assert message.startswith("the checkpoint of step 2 cannot be written to")
    assert "free space there" in message and "\n" not in message
    assert found == ["step_000000001"]
    assert intact


def test_too_little_space_is_told_before_writing(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 1000, 1000))

    def body(config: RunConfig) -> Any:
        with pytest.raises(TrainingError, match=r"has 0\.0 GiB free, a checkpoint takes about") as raised:
            checkpointer(config).save(1, Cursor(1))
        return str(raised.value)

    message = run(1, tmp_path / "p", body, tiny_config(shards, tmp_path, "bilevel.warmup_steps=50", "train.steps=60"))
    assert "the last checkpoint is intact" in message
