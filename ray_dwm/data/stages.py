"""The read order of a run in stages, each of which trains on rows of the pool that were chosen when it began.

The chosen rows lie in the run folder, `stages/<number>/rows.npy`, and are read there when they are needed: a plan holds
none of them, so that it travels to read tasks as cheaply as a ReadPlan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.plan import ReadPlan
from ray_dwm.errors import DataError

ROWS = "rows.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """LM steps `first` .. `stop` - 1."""

    number: int
    first: int
    stop: int


def cut(steps: int, stages: int) -> list[Stage]:
    """Stages of equal length, but for rounding: the first ones are the longer ones."""
    bounds = [number * (steps // stages) + min(number, steps % stages) for number in range(stages + 1)]
    return [Stage(number=n, first=bounds[n], stop=bounds[n + 1]) for n in range(stages)]


def stage_folder(run_dir: Path, number: int) -> Path:
    """Where a stage's rows and its record lie."""
    return run_dir / "stages" / str(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPlan:
    """As ReadPlan, over the chosen rows of one stage after the other; batch k is that of LM step k."""

    run_dir: str
    steps: int
    stages: int
    global_batch: int
    seed: int
    block_rows: int = 32
    window_blocks: int = 1024

    @property
    def stored(self) -> bool:
        """No stage is read in the order of the files."""
        return False

    def rows(self, batch: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """See ReadPlan.

        Raises:
            DataError: the stage's rows are not there.
        """
        stage = next(stage for stage in cut(self.steps, self.stages) if batch < stage.stop)
        chosen = chosen_rows(Path(self.run_dir), stage.number)
        plan = ReadPlan(
            rows_per_file=(len(chosen),),
            global_batch=self.global_batch,
            seed=self.seed + stage.number,
            block_rows=self.block_rows,
            window_blocks=self.window_blocks,
        )
        return np.asarray(chosen[plan.rows(batch - stage.first, rank, world)])


def chosen_rows(run_dir: Path, number: int) -> NDArray[np.int64]:
    """The rows of a stage, mapped.

    Raises:
        DataError: they are not there, or damaged.
    """
    path = stage_folder(run_dir, number) / ROWS
    try:
        return _mapped(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}, the rows that stage {number} trains on, cannot be read ({str(error).splitlines()[0]}): remove "
            f"{path.parent} and the checkpoints after the stage's first step, or the run folder, and train again"
        ) from None


@lru_cache(maxsize=4)
def _mapped(path: str, changed_ns: int) -> NDArray[np.int64]:
    del changed_ns  # a file that was replaced is another one
    rows: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    return rows
