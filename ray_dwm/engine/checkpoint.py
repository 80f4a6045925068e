"""DCP checkpoints: LM, optimizer, step, data cursor, RNG and the weighting's state (a DWM's optimizer too) as one.

A checkpoint is written to `step_*.tmp` and renamed when it is whole, so the newest `step_*` is always good.
What DCP pickles (its table of contents, the optimizer's numbers) is only read back where it holds plain values.
"""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ray_dwm.data.plan import Cursor
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.engine.weighting import Weighting
from ray_dwm.errors import TrainingError

_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, CheckpointException)


class Checkpointer:
    """Saves and restores the training state of all ranks."""

    def __init__(
        self, folder: Path, keep: int, lower: LowerLevel, weighting: Weighting | None, upper: UpperLevel | None = None
    ) -> None:
        self._folder, self._keep, self._lower, self._weighting = folder, keep, lower, weighting
        self._upper = upper

    def _state(self, step: int, cursor: Cursor) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._lower.model, self._lower.optimizer)
        state: dict[str, Any] = {
            "lm": model,
            "optimizer": optimizer,
            "loop": {
                "step": torch.tensor(step),
                "cursor": torch.tensor(cursor.batches),
                "rng": torch.get_rng_state(),
            },
        }
        if self._weighting is not None:
            state["weighting"] = self._weighting.state_dict(step)
        if self._upper is not None and (kept := self._upper.state_dict()):
            state["upper"] = kept
        return state

    def save(self, step: int, cursor: Cursor) -> Path:
        """Write the state after `step` steps and drop the oldest checkpoints beyond `keep`.

        Raises:
            TrainingError: no space or no permission; the checkpoints that were there are untouched.
        """
        path = self._folder / f"step_{step:09d}"
        temporary = path.with_suffix(".tmp")
        state = self._state(step, cursor)
        self._require_space()
        try:
            dcp.save(state, checkpoint_id=temporary)
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({str(error).splitlines()[0]}): "
                "free space there and start the same command again; the last checkpoint is intact"
            ) from None
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            for old in list_checkpoints(self._folder)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        return path

    def _require_space(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = int(1.05 * sum(p.numel() * 4 for p in self._lower.parameters) * 3)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise TrainingError(
                f"{self._folder} has {free / 2**30:.1f} GiB free, a checkpoint takes about {needed / 2**30:.1f} GiB: "
                "free space there and start the same command again; the last checkpoint is intact"
            )

    def load_latest(self) -> tuple[int, Cursor]:
        """Restore the newest whole checkpoint: (completed steps, cursor); (0, start) where there is none."""
        found = list_checkpoints(self._folder)
        if not found:
            return 0, Cursor()
        state = self._state(0, Cursor())
        try:
            _require_plain(found[-1])
            dcp.load(state, checkpoint_id=found[-1], planner=_PlainPlanner())
        except _DAMAGE as error:
            older = f"remove it to continue from {found[-2].name}" if found[:-1] else "remove it to start anew"
            raise TrainingError(
                f"checkpoint {found[-1]} is damaged or not of this run ({str(error).splitlines()[0]}): {older}"
            ) from None
        set_state_dict(
            self._lower.model,
            self._lower.optimizer,
            model_state_dict=state["lm"],
            optim_state_dict=state["optimizer"],
        )
        step = int(state["loop"]["step"])
        torch.set_rng_state(state["loop"]["rng"])
        if self._upper is not None:  # first: it holds the calendar that says which DWM version is in force
            self._upper.load_state_dict(state.get("upper", {}))
        if self._weighting is not None:
            self._weighting.load_state_dict(step, state["weighting"])
        return step, Cursor(int(state["loop"]["cursor"]))


# DCP keeps its table of contents, and what is no tensor, as pickles: only plain records may come out of them.
_RECORDS = "torch.distributed.checkpoint.metadata"
_VALUES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "int64", "uint8", "bool")),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse everything that could do more than hold values."""
        if "." not in name and (module == _RECORDS or (module, name) in _VALUES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _require_plain(checkpoint: Path) -> None:
    with (checkpoint / ".metadata").open("rb") as stream:
        _PlainUnpickler(stream).load()


class _PlainPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what is not plain, before the ordinary way takes it
        value.seek(0)
        super().load_bytes(read_item, value)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/.metadata") if not path.parent.name.endswith(".tmp"))
