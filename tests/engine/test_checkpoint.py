"""A checkpoint is whole or not there, is written beside training, and is passed over where it is damaged."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import resource
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo import run
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.plan import Cursor
from ray_dwm.engine import mesh, storage
from ray_dwm.engine.checkpoint import Checkpointer, list_checkpoints
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build
from ray_dwm.engine.state import TrainingState
from ray_dwm.errors import ConfigError, TrainingError

OPTIONS = ("bilevel.warmup_steps=50", "train.steps=60")


def checkpointer(config: RunConfig, parts: Parts | None = None) -> Checkpointer:
    parts = parts or build(config)
    return Checkpointer(config, TrainingState(parts.lower, parts.weighting), parts.identity, parts.mesh)


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())


def save(subject: Checkpointer, *steps: int) -> None:
    for step in steps:
        subject.save(step, Cursor(step + 10))
        subject.wait()


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


@pytest.mark.parametrize(("spoil", "world", "reason"), SPOILT)
def test_a_damaged_or_hostile_checkpoint_is_passed_over_and_kept_aside(
    shards: dict[str, Path], tmp_path: Path, spoil: Any, world: int, reason: str
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, f"cluster.workers={world}")
    step, restored, said, found = run(world, tmp_path / "p", load_spoiled, config, spoil, tmp_path / "mark", False)
    assert (step, restored) == (1, True)
    assert found == ["step_000000001", "step_000000002.damaged"]
    assert said.startswith(f"[{config.name}] warning: checkpoint step_000000002 is damaged (") and reason in said
    assert said.endswith("), kept as step_000000002.damaged: continuing from step 1\n") and said.count("\n") == 1
    assert not (tmp_path / "mark").exists()


def test_where_none_is_good_the_run_does_not_start_anew(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS)
    message, found = run(1, tmp_path / "p", load_spoiled, config, cut, tmp_path / "mark", True)
    assert message.startswith(f"no checkpoint in {config.run_dir / 'checkpoints'} is good (step_000000002: ")
    assert "step_000000001: " in message and "\n" not in message
    assert found == ["step_000000001", "step_000000002"]


def sees_late(config: RunConfig, after_s: float, limit_s: float) -> tuple[int, str, list[str], str]:
    """What loading does where rank 1 sees the newest checkpoint only after a while, as on a network file system."""
    storage.SIGHT_LIMIT_S, storage._SAID_AFTER_S, storage._POLL_S = limit_s, 0.1, 0.05
    subject, step, message = checkpointer(config), 0, ""
    save(subject, 1, 2)
    start, ordinary = time.monotonic(), storage.damage

    def late(checkpoint: Path) -> str | None:
        lagging = dist.get_rank() == 1 and checkpoint.name == "step_000000002" and time.monotonic() - start < after_s
        return ".metadata is missing" if lagging else ordinary(checkpoint)

    storage.damage = late
    os.environ["LOCAL_RANK"] = "0"  # the ranks are on nodes of their own
    try:
        step, _ = subject.load_latest()
    except TrainingError as error:
        message = str(error)
    dist.barrier()
    return step, message, names(config), (config.run_dir / "messages.log").read_text()


@pytest.mark.parametrize("comes", [True, False])
def test_a_rank_that_sees_a_checkpoint_late_does_not_condemn_it(
    shards: dict[str, Path], tmp_path: Path, comes: bool
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, "cluster.workers=2", "weighting.method=uniform")
    times = (0.5, 60.0) if comes else (60.0, 0.5)
    step, message, found, said = run(2, tmp_path / "p", sees_late, config, *times)
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


def stored(checkpoint: Path, parts: Parts) -> list[torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    state = TrainingState(parts.lower, parts.weighting).capture(0, Cursor())
    dcp.load(state, checkpoint_id=checkpoint)
    leaves = [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in leaves]


def written_late(config: RunConfig) -> Any:
    """A checkpoint of step 3 that is written when step 6 is over, and the one of a run that waits for it."""
    training_is_over, ordinary = threading.Event(), dcp.save

    def late(*arguments: Any, **options: Any) -> Any:
        training_is_over.wait(60)
        return ordinary(*arguments, **options)

    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build(config)
    trainer = Trainer(parts)
    if config.checkpoint.asynchronous:
        dcp.save = late
        step = trainer._train_step

        def last(index: int, *batches: Any) -> Any:
            result = step(index, *batches)
            if index == 5:
                assert trainer._checkpointer.writing
                training_is_over.set()
            return result

        trainer._train_step = last  # type: ignore[method-assign]
    trainer.fit()
    dist.barrier()  # rank 0 has renamed the last one
    folder = config.run_dir / "checkpoints"
    return names(config), [stored(path, parts) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(("world", "extra"), [(1, ()), (2, ("bilevel.reuse=3", "bilevel.every=1"))])
def test_what_is_written_late_is_what_was_there_when_it_was_saved(
    shards: dict[str, Path], tmp_path: Path, world: int, extra: tuple[str, ...]
) -> None:
    found = {}
    for asynchronous in (False, True):
        options = (f"checkpoint.asynchronous={asynchronous}", f"cluster.workers={world}", *extra)
        config = tiny_config(shards, tmp_path / str(asynchronous), *options)
        found[asynchronous] = run(world, tmp_path / f"p{asynchronous}", written_late, config)
    assert found[True][0] == found[False][0] == ["step_000000003", "step_000000006"]
    for one, other in zip(found[True][1], found[False][1], strict=True):
        assert len(one) > 100
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*found[True][1], strict=True))


def write_limit(config: RunConfig) -> tuple[str, list[str], bool]:
    """Every write beyond 10 kB fails, as on a full disk."""
    subject = checkpointer(config)
    save(subject, 1)
    dist.barrier()  # rank 0 has renamed it
    before = {p.name: p.read_bytes() for p in list_checkpoints(config.run_dir / "checkpoints")[0].iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        save(subject, 2)
        message = "no error"
    except TrainingError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in list_checkpoints(config.run_dir / "checkpoints")[0].iterdir()}
    return message, names(config), before == after


@pytest.mark.parametrize(("world", "asynchronous"), [(1, False), (2, False), (2, True)])
def test_a_failing_write_leaves_the_last_checkpoint(
    shards: dict[str, Path], tmp_path: Path, world: int, asynchronous: bool
) -> None:
    options = (f"cluster.workers={world}", f"checkpoint.asynchronous={asynchronous}")
    config = tiny_config(shards, tmp_path, *OPTIONS, *options)
    message, found, intact = run(world, tmp_path / "p", write_limit, config)
    assert message.startswith("the checkpoint of step 2 cannot be written to")
    assert "free space there" in message and "\n" not in message
    assert found == ["step_000000001"]
    assert intact


def failing_storage(config: RunConfig, number: int, place: int) -> tuple[str, str, list[str]]:
    """The kind and message of a save during which rank `place` meets an error of the system."""
    subject = checkpointer(config)
    save(subject, 1)
    if dist.get_rank() == place:

        def failing(*arguments: Any) -> Any:
            try:
                raise OSError(number, os.strerror(number))
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")  # as torch hides it

        storage.FileSystemWriter.write_data = failing  # type: ignore[method-assign]
    with pytest.raises((TrainingError, OSError)) as raised:
        save(subject, 2)
    return type(raised.value).__name__, str(raised.value), names(config)


@pytest.mark.parametrize(
    ("number", "place", "kind", "told"),
    [
        (errno.ENOSPC, 0, "TrainingError", "(No space left on device): free space there and"),
        (errno.EDQUOT, 1, "TrainingError", "(Disk quota exceeded): free space there and"),
        (errno.EACCES, 1, "TrainingError", "(Permission denied): allow writing there and"),
        (errno.EIO, 1, "OSError", "(Input/output error)"),
        (errno.ESTALE, 0, "OSError", "(Stale file handle)"),
    ],
)
def test_only_what_a_restart_would_meet_again_ends_the_run(
    shards: dict[str, Path], tmp_path: Path, number: int, place: int, kind: str, told: str
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, "cluster.workers=2", "weighting.method=uniform")
    found, message, left = run(2, tmp_path / "p", failing_storage, config, number, place)
    assert found == kind
    assert message.startswith("the checkpoint of step 2 cannot be written to") and "\n" not in message
    assert told in message.replace(f"[Errno {number}] ", "")
    assert left == ["step_000000001"]


def fails_in_training(config: RunConfig) -> tuple[str, int]:
    """The message of a run that cannot write its checkpoints, and the steps it got to."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    told: list[int] = []
    trainer = Trainer(build(config, on_checkpoint=lambda step, path, figures: told.append(step)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        trainer.fit()
    except TrainingError as error:
        return str(error), len(told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "no error", len(told)


def test_a_write_that_fails_beside_training_stops_the_run(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "cluster.workers=2")
    message, told = run(2, tmp_path / "p", fails_in_training, config)
    assert message.startswith("the checkpoint of step 3 cannot be written to") and "\n" not in message
    assert told == 0 and names(config) == []


def tell(config: RunConfig) -> list[tuple[int, str, bool, float]]:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    told = []

    def on_checkpoint(step: int, path: Path, figures: dict[str, float]) -> None:
        whole = (path / ".metadata").exists() and (path / "identity.json").exists()
        told.append((step, path.name, whole, figures["step"]))

    Trainer(build(config, on_checkpoint=on_checkpoint)).fit()
    return told


def test_a_checkpoint_is_told_when_it_is_whole(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "cluster.workers=2")
    told = run(2, tmp_path / "p", tell, config)
    assert told == [(3, "step_000000003", True, 3), (6, "step_000000006", True, 6)]
    made_by = json.loads((config.run_dir / "checkpoints" / "step_000000006" / "identity.json").read_text())["made_by"]
    assert made_by["mesh"] == {"dp_shard": 2}


def without_space(config: RunConfig, place: int) -> str:
    """What rank 0 says of a save where rank `place` finds no space."""
    if dist.get_rank() == place:
        usage = namedtuple("usage", "total used free")
        shutil.disk_usage = lambda _: usage(2**30, 2**30 - 1000, 1000)  # type: ignore[assignment,return-value]
    try:
        save(checkpointer(config), 1)
    except TrainingError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("place", "told"), [(0, "has 0.0 GiB free, a checkpoint takes about"), (1, "saved")])
def test_rank_0_tells_all_of_too_little_space(shards: dict[str, Path], tmp_path: Path, place: int, told: str) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, "cluster.workers=2", "weighting.method=uniform")
    assert told in run(2, tmp_path / "p", without_space, config, place)


def device_of_the_writer(config: RunConfig) -> tuple[list[Any], float]:
    """What the writer's thread makes its device where this process has GPU 3, and its group's time limit in seconds."""
    taken: list[Any] = []
    subject = checkpointer(config)
    mesh.device, torch.cuda.set_device = lambda: torch.device("cuda", 3), taken.append  # type: ignore[assignment]
    save(subject, 1)
    options = subject._group._get_backend(torch.device("cpu")).options
    return taken, options._timeout.total_seconds()


def test_the_writer_works_on_the_device_and_in_the_time_of_its_rank(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, "weighting.method=uniform", "cluster.workers=2")
    taken, limit_s = run(2, tmp_path / "p", device_of_the_writer, config)
    assert taken == [torch.device("cuda", 3)]
    assert limit_s == mesh.TIMEOUT_S
