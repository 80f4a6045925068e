"""Scores of a pool by a DWM as a job: one Parquet file, and what it says of each domain."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.errors import UserError
from ray_dwm.orchestration.cluster import connect, warn_if_temporary
from ray_dwm.orchestration.select import plan_selection, scored_pool, task_of
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import work_folder
from ray_dwm.selection.method import Scored, Task
from ray_dwm.selection.scores import FILE


def score(config: RunConfig, output: Path) -> None:
    """Score all of data.train by the DWM in selection.dwm.folder.

    Args:
        output: a Parquet file that does not exist yet. Finished blocks of an interrupted run are kept beside it.

    Raises:
        UserError: before anything was started, or where the data do not allow it; no half-written file is left.
    """
    warn_if_temporary("--output", str(output))
    output = output.expanduser().absolute()
    _require_new(output)
    pool = load_manifest(config.data.train)
    options = dataclasses.replace(
        config.selection, budget=pool.rows * pool.seq_len, output=str(output), keep_scores=True, scores=""
    )
    data = dataclasses.replace(config.data, selection="dwm")
    selection = plan_selection(dataclasses.replace(config, data=data, selection=options))
    connect(config)
    with work_folder(output, selection.depends_on) as work:
        _require_new(output)  # another process may have made it meanwhile
        task = task_of(selection, RaySweep(work, options))
        scored = scored_pool(selection, task, work)
        os.replace(work / FILE, output)
    print(table(pool, scored), spread(task), f"scores: {output}", sep="\n", flush=True)


def _require_new(output: Path) -> None:
    if output.exists() or not output.parent.is_dir():
        raise UserError(f"--output {output} cannot be written: name a new file in a folder that exists")


def table(pool: Manifest, scored: Scored) -> str:
    """Sequences, mean and standard deviation of the scores of every domain."""
    lines = [f"{'domain':<16}{'sequences':>12}{'mean score':>12}{'deviation':>11}"]
    for code, name in enumerate(pool.domain_names):
        found = scored.scores[scored.domains == code]
        lines.append(f"{name:<16}{len(found):>12,}{found.mean():>12.4f}{found.std():>11.4f}")
    return "\n".join(lines)


def spread(task: Task) -> str:
    """How much of the scores' differences is the company in which sequences were scored."""
    found, rounds = task.notes["deviation"], task.options.dwm.rounds
    error = found["over_rounds"] / rounds**0.5
    return (
        f"scores differ by {found['over_rows']:.4f} between sequences, and by {found['over_rounds']:.4f} between the "
        f"batches that a sequence is in: the mean over {rounds} of them errs by {error:.4f}"
    )
