"""Scores of a DWM for data that it was not learnt on.

A DWM scores a whole batch jointly, so a sequence's score depends on its company: it is averaged over random batches,
drawn as training draws them (data/plan.py: an epoch of the read plan is a round). Weights are a softmax, which sees
only differences within a batch, so scores are centred in each batch before they are averaged.

Legend: n = rows of the pool, D = the DWM's width, B = rows that are scored jointly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import Manifest, file_sha256
from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.shards import Rows
from ray_dwm.engine.mesh import device
from ray_dwm.errors import ConfigError, DataError
from ray_dwm.models.dwm import DataWeightingModel
from ray_dwm.models.folders import load_dwm
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Arrays, RowFunction, Scored, Task
from ray_dwm.selection.told import Told

_ROWS = 32
"""Encoded in one pass."""


@lru_cache(maxsize=2)
def _model(folder: str) -> DataWeightingModel:
    """In evaluation mode on this process's device, loaded once."""
    return load_dwm(Path(folder))[0].to(device()).eval()


def _folder(options: SelectionConfig) -> Path:
    return Path(options.dwm.folder).expanduser().absolute()


def check(options: SelectionConfig, pool: Manifest, count: int) -> None:
    """See Method.check.

    Raises:
        ConfigError, DataError: no DWM folder, or one that cannot score this pool.
    """
    del count
    if not options.dwm.folder:
        raise ConfigError("selection.dwm.folder is empty: name a DWM folder, as `ray-dwm export` makes")
    folder, batch = _folder(options), options.dwm.batch
    model, _ = load_dwm(folder, pool.tokenizer_sha256)
    if model.shape.lm_features:
        raise DataError(
            f"the DWM in {folder} looks at the LM's loss and entropy (dwm.lm_features), which a pool does not have: "
            "learn one with dwm.lm_features=false"
        )
    if batch > pool.rows:
        raise ConfigError(f"selection.dwm.batch is {batch}, the pool {pool.folder} has {pool.rows} sequences: lower it")


def depends(options: SelectionConfig) -> dict[str, Any]:
    """How scores are averaged, and the DWM's files."""
    digests = [file_sha256(_folder(options) / name) for name in ("config.json", "model.safetensors")]
    dwm = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"dwm": dwm, "rounds": options.dwm.rounds, "batch": options.dwm.batch}


def choose(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """Rows drawn by weight, or of highest score."""
    return (drawn if task.options.dwm.choice == "drawn" else highest)(task, scored, count)


def prepare(task: Task) -> RowFunction:
    """The DWM's encoder, which sees single rows; `finish` makes scores of what it says."""
    return Encoded(str(_folder(task.options)))


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the joint head needs of some rows: `encoded`, (n, D + 1)."""

    folder: str

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Arrays:
        model, parts = _model(self.folder), []
        for start in range(0, len(rows), _ROWS):
            ids = torch.from_numpy(rows.input_ids[start : start + _ROWS].astype(np.int64))
            parts.append(model.encode(ids.to(device())).float().cpu().numpy())
        return {"encoded": np.concatenate(parts)}


def finish(task: Task, blocks: Iterable[Arrays]) -> Iterator[Arrays]:
    """Joint scores in the place of encodings, and `spread`, their standard deviation over the rounds.

    The encodings of the whole pool are held here: 4 (D + 1) bytes a row.
    """
    o, pool = task.options.dwm, task.pool
    model = load_dwm(_folder(task.options))[0].eval()
    encoded = np.empty((pool.rows, model.shape.width + 1), dtype=np.float32)
    kept, at = [], 0
    for block in blocks:
        stop = at + len(block["encoded"])
        encoded[at:stop] = block["encoded"]
        kept.append((at, stop, {name: values for name, values in block.items() if name != "encoded"}))
        at = stop
    plan = ReadPlan(rows_per_file=pool.rows_per_file, global_batch=o.batch, seed=task.seed)
    scores, spread = joint_scores(model, encoded, plan, o.rounds)
    task.notes["deviation"] = {"over_rows": float(scores.std()), "over_rounds": float(np.sqrt((spread**2).mean()))}
    for start, stop, columns in kept:
        yield {**columns, "score": scores[start:stop], "spread": spread[start:stop]}


@torch.no_grad()
def joint_scores(
    model: DataWeightingModel, encoded: NDArray[np.float32], plan: ReadPlan, rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation, over some epochs of a read plan, of each row's centred score in its batch, (n,).

    What is left of an epoch fills its last batch with the rows before it, whose scores are not counted twice.

    Args:
        encoded: (n, D + 1), of all rows in the plan.
    """
    n, batch = len(encoded), plan.global_batch
    total, squares = np.zeros(n), np.zeros(n)
    told = Told("joint scores", rounds * -(-n // batch), unit="batches")
    for epoch in range(rounds):
        for due in range(0, n, batch):
            first = min(due, n - batch)
            rows = plan.at(epoch, np.arange(first, first + batch))
            scores = model.scores(torch.from_numpy(encoded[rows])).double().numpy()
            new = slice(due - first, None)
            centred = (scores - scores.mean())[new]
            total[rows[new]] += centred
            squares[rows[new]] += centred**2
            told.one()
    variance = (squares - total**2 / rounds) / (rounds - 1)
    return total / rounds, np.sqrt(np.maximum(variance, 0.0))
