"""MATES: sequences that a model of influence expects to help the LM as it is now.

Yu et al. 2024 (arXiv 2406.06046): probe the current LM for oracle influences (engine/probe.py), learn them
(selection/influence.py), score all candidates, draw by Gumbel top-k. `select` does that once, with proxy LMs; a run of
data.selection=mates does it with its own LM at the start of every stage (orchestration/mates.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import to_dict
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows
from ray_dwm.engine.saved import newest_step
from ray_dwm.errors import ConfigError, DataError
from ray_dwm.selection.influence import Fit, Influence, standardised
from ray_dwm.selection.method import Arrays, RowFunction, Task
from ray_dwm.selection.record import quantiles

Look = tuple[str, int]
"""A run folder and the steps after which its LM is probed."""
_BLOCKS = 8
"""Units of work of each task: few, because each may load the LM again."""


def prepare(task: Task) -> RowFunction:
    """A model of the proxies' influences, standardised and averaged over them."""
    looks = [look_of(Path(folder)) for folder in task.proxies]
    return learn(task, looks, np.arange(task.pool.rows), task.pool.seq_len)


def depends(options: SelectionConfig) -> dict[str, Any]:
    """All options but those of a run's stages."""
    return {key: value for key, value in to_dict(options.mates).items() if key not in ("stages", "candidates")}


def check(options: SelectionConfig, pool: Manifest, count: int) -> None:
    """See Method.check.

    Raises:
        ConfigError: there are fewer sequences than probes.
    """
    del count
    check_probes(options, pool.rows)


def check_probes(options: SelectionConfig, candidates: int) -> None:
    """Compare the number of probes with that of the sequences that they are taken from.

    Raises:
        ConfigError: these are fewer.
    """
    if options.mates.probes > candidates:
        raise ConfigError(
            f"selection.mates.probes is {options.mates.probes}, and there are {candidates} sequences to choose from: "
            "lower it"
        )


def look_of(folder: Path) -> Look:
    """The newest checkpoint of the run whose LM was exported to a folder.

    Raises:
        DataError: there is none.
    """
    step = newest_step(folder.parent) if (folder.parent / "config.yaml").is_file() else None
    if step is None:
        raise DataError(
            f"proxy LM {folder} has no checkpoint beside it, and mates takes steps with the optimizer's state: name a "
            "run folder with its checkpoints in selection.proxy.folders, or leave that empty"
        )
    return str(folder.parent), step


def learn(
    task: Task,
    looks: Sequence[Look],
    candidates: NDArray[np.int64],
    seq_len: int,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> Influence:
    """Probe the LMs with some of the candidates, and learn what all of them do.

    Args:
        candidates: row numbers of the pool.
        seq_len: tokens of each sequence that the LMs see.
        weights: name -> weight of a target set in the target loss; 1 where it is not named.
    """
    options, pool = task.options.mates, str(task.pool.folder)
    probes = _drawn(candidates, options.probes, task.seed)
    targets = {name: str(manifest.folder) for name, manifest in task.targets.items()}
    oracle = Oracle(tuple(looks), targets, dict(weights), options.probe_targets, task.seed)
    block = -(-len(probes) // (_BLOCKS * task.options.tasks))
    blocks = task.sweep("influences of probes", pool, oracle, probes, block)
    influences = np.concatenate([block["influences"] for block in blocks])
    fit = Fit(_combined(influences), options, task.pool.vocab_size, seq_len, task.seed)
    (fitted,) = task.sweep("influence model", pool, fit, probes, len(probes))
    task.notes["probes"] = len(probes)
    task.notes["influence"] = quantiles(influences[np.isfinite(influences)])
    for name in ("spearman", "r2", "judged", "epochs"):
        task.notes[name] = float(fitted[name])
    return Influence.of(fitted, fit)


def _drawn(candidates: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Some of the candidates at random, ascending."""
    rng = np.random.Generator(np.random.Philox(seed))
    return np.sort(rng.choice(candidates, min(count, len(candidates)), replace=False))


def _combined(influences: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, LMs) -> (n,): LMs differ in how far a step moves them, so each one's influences are standardised."""
    mean: NDArray[np.float64] = np.stack([standardised(values) for values in influences.T]).mean(axis=0)
    return mean


@dataclass(frozen=True, slots=True)
class Oracle:
    """Oracle influences of some rows on some LMs: `influences`, (n, LMs), in nats a target token."""

    looks: tuple[Look, ...]
    targets: Mapping[str, str]
    weights: Mapping[str, float]
    sequences: int
    """Of each target set."""
    seed: int

    def __call__(self, rows: Rows) -> Arrays:
        from ray_dwm.engine.probe import open_prober  # transformers, which only this task needs

        found = []
        for folder, step in self.looks:
            prober = open_prober(Path(folder), step)
            found.append(prober.influences(rows, self.targets, self.sequences, self.seed, self.weights))
        return {"influences": np.stack(found, axis=1)}
