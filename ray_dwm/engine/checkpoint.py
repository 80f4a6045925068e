"""DCP checkpoints: written beside training, whole or not there, and passed over where they are damaged.

All ranks write to `step_*.tmp`; rank 0 renames it when the last of them is done: a `step_*` is whole when it appears.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from ray_dwm.engine.mesh import is_main
from ray_dwm.engine.messages import say
from ray_dwm.engine.plain import ForeignState, PlainPlanner, damage, first_line
from ray_dwm.engine.state import TrainingState
from ray_dwm.errors import TrainingError


class Checkpointer:
    """Saves and restores the training state of all ranks; they call all methods together, but for `writing`."""

    def __init__(self, config: RunConfig, state: TrainingState, identity: Identity, mesh: Mapping[str, int]) -> None:
        self._folder, self._options = config.run_dir / "checkpoints", config.checkpoint
        self._state, self._identity, self._mesh = state, identity, mesh
        # A group of its own, on the CPU: the writer's collectives run beside those of the step.
        self._group = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._main = is_main()

    def save(self, step: int, cursor: Cursor) -> None:
        """Save the state after `step` steps, when the save before it has ended (`wait`).

        Returns once the state is copied to the host's memory; without `checkpoint.asynchronous`, once it is written.

        Raises:
            TrainingError: no space or no permission; the checkpoints that were there are untouched.
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
            TrainingError: it could not be written.
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
            dcp.save(state, checkpoint_id=temporary, process_group=self._group)
            if self._main:
                write_identity(temporary, self._identity, self._mesh)
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                self._drop_old()
        except (OSError, CheckpointException) as error:  # a lost rank is another error, which a restart mends
            if self._main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({first_line(_cause(error))}): "
                "free space there and start the same command again; the last checkpoint is intact"
            ) from None
        return path

    def _drop_old(self) -> None:
        every = self._options.keep_every
        for old in list_checkpoints(self._folder)[: -self._options.keep]:
            if not every or step_of(old) % every:
                shutil.rmtree(old, ignore_errors=True)

    def _require_space(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = int(1.05 * sum(p.numel() * 4 for p in self._state.lower.parameters) * 3)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise TrainingError(
                f"{self._folder} has {free / 2**30:.1f} GiB free, a checkpoint takes about {needed / 2**30:.1f} GiB: "
                "free space there and start the same command again; the last checkpoint is intact"
            )

    def load_latest(self) -> tuple[int, Cursor]:
        """Restore the newest checkpoint that is good: (completed steps, cursor); (0, start) where there is none.

        Damaged ones that are newer are said and kept aside as `step_*.damaged`; what an interrupted save left goes.

        Raises:
            ConfigError: a checkpoint is of another model, tokenizer, optimizer or weighting.
            TrainingError: there are checkpoints, but none is good.
        """
        damaged: dict[Path, str] = {}
        found = self._same(list_checkpoints(self._folder))
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

    def _load(self, path: Path, state: dict[str, Any]) -> str | None:
        """Load into `state`, where no rank sees damage: why it is no good, the same on all ranks, or None."""
        verdict = (difference(path, self._identity), damage(path) or _unnamed(path))
        others, reasons = zip(*self._gather(verdict), strict=True)
        if (other := next(filter(None, others), None)) is not None:
            raise foreign(path, other)
        if (reason := next(filter(None, reasons), None)) is not None:
            return str(reason)
        try:
            dcp.load(state, checkpoint_id=path, planner=PlainPlanner(), process_group=self._group)
        except CheckpointException as error:  # raised on all ranks, whichever has met it
            cause = _cause(error)
            if isinstance(cause, ForeignState):
                raise foreign(path, str(cause)) from None
            return first_line(cause)
        return None

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _same(self, paths: list[Path]) -> list[Path]:
        """What rank 0 has seen: the others may see a folder later."""
        return list(self._gather(paths)[0])

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


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first of the ranks that failed."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/.metadata") if not path.parent.suffix)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step_"))
