"""Reading what DCP stores as pickles only where it holds plain values, and telling damage before it is loaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from ray_dwm.errors import first_line

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


class ForeignState(Exception):
    """The checkpoint holds other tensors than the run."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse everything that could do more than hold values."""
        if "." not in name and (module == _RECORDS or (module, name) in _VALUES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be what was written: its table of contents, or a file that is missing or too short.

    Raises:
        OSError: the storage fails, which says nothing about the checkpoint.
    """
    try:
        with (checkpoint / ".metadata").open("rb") as stream:
            metadata = _PlainUnpickler(stream).load()
        ends: dict[str, int] = {}
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in ends.items():
            size = (checkpoint / name).stat().st_size
            if size < end:
                return f"{name} has {size} of {end} bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError:
        raise
    except Exception as error:  # a garbled pickle can raise anything
        return f".metadata cannot be read: {first_line(error)}"
    return None


class PlainPlanner(DefaultLoadPlanner):
    """DCP's own, but it loads plain values only and tells another state from a damaged one."""

    def create_local_plan(self) -> LoadPlan:
        """See LoadPlanner.

        Raises:
            ForeignState: a tensor is missing, or has another shape.
        """
        try:
            return super().create_local_plan()
        except (RuntimeError, ValueError) as error:
            raise ForeignState(first_line(error)) from None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See LoadPlanner."""
        torch.load(value, weights_only=True)  # refuses what is not plain, before the ordinary way takes it
        value.seek(0)
        super().load_bytes(read_item, value)
