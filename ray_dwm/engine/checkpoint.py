"""DCP checkpoints: written beside training, whole or not there, and passed over where they are damaged.

All ranks write to `step_*.tmp`; rank 0 renames it when the last of them is done: a `step_*` is whole when it appears.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ray_dwm.config import RunConfig
from ray_dwm.data.plan import Cursor
from ray_dwm.engine.identity import Identity, difference, foreign, read_identity, write_identity
from ray_dwm.engine.mesh import TIMEOUT_S, is_main, take_device
from ray_dwm.engine.messages import say
from ray_dwm.engine.plain import ForeignState, PlainPlanner, damage
from ray_dwm.engine.saved import list_checkpoints, step_of
from ray_dwm.engine.state import TrainingState
from ray_dwm.engine.storage import SIGHT_LIMIT_S, Writer, await_sight, digest, remedy
from ray_dwm.errors import TrainingError, first_line

Found = TypeVar("Found")


class Checkpointer:
    """Saves and restores the training state of all ranks; they call all methods together, but for `writing`."""

    def __init__(self, config: RunConfig, state: TrainingState, identity: Identity, mesh: Mapping[str, int]) -> None:
        self._folder, self._options = config.run_dir / "checkpoints", config.checkpoint
        self._state, self._identity, self._mesh = state, identity, mesh
        # A group of its own, on the CPU: the writer's collectives run beside those of the step.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=take_device)
        self._pending: Future[Path] | None = None
        self._main = is_main()

    def save(self, step: int, cursor: Cursor) -> None:
        """Save the state after `step` steps, when the save before it has ended (`wait`).

        Returns once the state is copied to the host's memory; without `checkpoint.asynchronous`, once it is written.

        Raises:
            TrainingError: no space or no permission; the checkpoints that were there are untouched.
            OSError: the storage fails, as a network file system may for a while.
        """
        assert self._pending is None, "wait for the save before"
        self._require_space()
        state = self._state.capture(step, cursor)
        if self._options.asynchronous:
            self._pending = self._writer.submit(self._write, step, _copy(state))
        else:
            self._pending = Future()
            self._pending.set_result(self._write(step, state))

    @property
    def writing(self) -> bool:
        """Whether this rank is still at it."""
        return self._pending is not None and not self._pending.done()

    @property
    def pending(self) -> bool:
        """Whether there is a save whose end has not been told (`wait`); the same on all ranks."""
        return self._pending is not None

    def wait(self) -> Path | None:
        """Wait for the last save, if its end has not been told yet: its folder.

        Raises:
            TrainingError, OSError: it could not be written; see `save`.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Let the last save end, whatever comes of it."""
        self._writer.shutdown()

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        path = self._folder / f"step_{step:09d}"
        temporary = path.with_suffix(".tmp")
        try:
            # On rank 0 it returns when all ranks have written, and the table of contents is there.
            dcp.save(state, storage_writer=Writer(temporary), process_group=self._group)
            if self._main:
                write_identity(temporary, self._identity, self._mesh)
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                self._drop_old()
        except (OSError, CheckpointException) as error:  # a lost rank is another error
            if self._main:
                shutil.rmtree(temporary, ignore_errors=True)
            causes = _causes(error)
            cause = next(filter(remedy, causes), causes[0])
            told = f"the checkpoint of step {step} cannot be written to {self._folder} ({first_line(cause)})"
            if todo := remedy(cause):
                raise TrainingError(f"{told}: {todo}") from None
            raise OSError(told) from None
        return path

    def _drop_old(self) -> None:
        every = self._options.keep_every
        for old in list_checkpoints(self._folder)[: -self._options.keep]:
            if not every or step_of(old) % every:
                shutil.rmtree(old, ignore_errors=True)

    def _require_space(self) -> None:
        if (told := self._by_main(self._lack)) is not None:
            raise TrainingError(told)

    def _lack(self) -> str | None:
        """Why a checkpoint will not fit."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if todo := remedy(error):
                return f"{self._folder} cannot be made ({error.strerror}): {todo}"
            raise
        needed = int(1.05 * sum(p.numel() * 4 for p in self._state.lower.parameters) * 3)
        free = shutil.disk_usage(self._folder).free
        if free >= needed:
            return None
        return (
            f"{self._folder} has {free / 2**30:.1f} GiB free, a checkpoint takes about {needed / 2**30:.1f} GiB: "
            "free space there and start the same command again; the last checkpoint is intact"
        )

    def load_latest(self) -> tuple[int, Cursor]:
        """Restore the newest checkpoint that is good: (completed steps, cursor); (0, start) where there is none.

        Damaged ones that are newer are said and kept aside as `step_*.damaged`; what an interrupted save left goes.

        Raises:
            ConfigError: a checkpoint is of another model, tokenizer, optimizer or weighting.
            TrainingError: there are checkpoints, but none is good, or a rank does not see what rank 0 sees.
            OSError: the storage fails.
        """
        damaged: dict[Path, str] = {}
        found = self._by_main(lambda: list_checkpoints(self._folder))
        for path in reversed(found):
            state = self._state.capture(0, Cursor())
            reason = self._load(path, state)
            if reason is None:
                step, cursor = self._state.apply(state)
                self._tidy(damaged, step)
                return step, cursor
            damaged[path] = reason
        if damaged:
            told = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
            raise TrainingError(
                f"no checkpoint in {self._folder} is good ({told}): restore one, or remove the folder to start anew"
            )
        self._tidy({}, 0)
        return 0, Cursor()

    def load(self, path: Path) -> tuple[int, Cursor]:
        """Restore one checkpoint: (completed steps, cursor); the folder stays as it is.

        Raises:
            ConfigError: it is of another model, tokenizer, optimizer or weighting.
            TrainingError: it is damaged.
        """
        state = self._state.capture(0, Cursor())
        reason = self._load(path, state)
        if reason is not None:
            raise TrainingError(f"checkpoint {path} is damaged ({reason}): remove it and start the same command again")
        return self._state.apply(state)

    def _load(self, path: Path, state: dict[str, Any]) -> str | None:
        """Load into `state`, where rank 0 finds no damage: why it is no good, the same on all ranks, or None."""
        other, reason, expected = self._by_main(
            lambda: (difference(path, self._identity), damage(path) or _unnamed(path), digest(path))
        )
        if other is not None:
            raise foreign(path, other)
        if reason is not None:
            return reason
        self._await_sight(path, expected)
        try:
            dcp.load(state, checkpoint_id=path, planner=PlainPlanner(), process_group=self._group)
        except CheckpointException as error:  # raised on all ranks, whichever has met it
            cause = _causes(error)[0]
            if isinstance(cause, ForeignState):
                raise foreign(path, str(cause)) from None
            if isinstance(cause, OSError):
                raise OSError(f"checkpoint {path} cannot be read ({first_line(cause)})") from None
            return first_line(cause)
        return None

    def _await_sight(self, path: Path, expected: str) -> None:
        """Let the other ranks come to see a checkpoint that rank 0 sees: a network file system may lag."""
        blind: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(blind, None if self._main else await_sight(path, expected), group=self._group)
        if (who := next(filter(None, blind), None)) is not None:
            raise TrainingError(
                f"checkpoint {path} is good on rank 0, and after {SIGHT_LIMIT_S:g} s still not what another one sees "
                f"({who}): {self._folder} must lie on storage that all nodes share"
            )

    def _by_main(self, find: Callable[[], Found]) -> Found:
        """What rank 0 finds in the folder, on all ranks."""
        found = [find() if self._main else None]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return cast(Found, found[0])

    def _tidy(self, damaged: Mapping[Path, str], step: int) -> None:
        """Once something good is loaded: put the damaged aside, drop what killed attempts left half written."""
        if self._main:
            for path, reason in damaged.items():
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                say(
                    self._folder.parent,
                    f"warning: checkpoint {path.name} is damaged ({reason}), kept as {aside.name}: continuing from "
                    f"step {step}",
                )
            for left in self._folder.glob("step_*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier(group=self._group)


@torch.no_grad()
def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """The state in the host's memory, beyond the reach of the steps that follow."""
    state = tree_map_only(DTensor, _at_the_start, state)
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    copied = stager.stage(state)
    stager.close()
    assert isinstance(copied, dict)
    return copied


def _at_the_start(tensor: DTensor) -> DTensor:
    """DCP's stager fails for a distributed tensor whose part begins inside its storage, as a view's does."""
    local = tensor.to_local()
    if local.storage_offset() == 0:
        return tensor
    return DTensor.from_local(
        local.clone(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _unnamed(checkpoint: Path) -> str | None:
    return None if read_identity(checkpoint) else "identity.json is missing or cannot be read"


def _causes(error: BaseException) -> list[BaseException]:
    """What went wrong on the ranks that failed, the first one first."""
    return [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
