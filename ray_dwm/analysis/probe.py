"""A fixed sample of the pool, weighed by the DWM of every phase in random batches.

What a run records confounds three things: which sequences came, in whose company, and how the DWM of that step weighed
them. Here the sequences are the same for every phase and the company is drawn again and again, so that what differs
between phases is the DWM, and what differs between draws is the company.

Legend: n = sequences of the probe, B = of a batch, R = draws (rounds), P = phases, D = the DWM's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dwm.analysis.phases import Span
from ray_dwm.analysis.ranks import Floats, correlation, ranks
from ray_dwm.analysis.resampling import Matrix
from ray_dwm.analysis.runs import Run
from ray_dwm.config import DwmConfig
from ray_dwm.core.weighting import log_relative, weights_from_scores
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows
from ray_dwm.engine.replay import Entry, read_trajectory
from ray_dwm.errors import DataError
from ray_dwm.models.dwm import DataWeightingModel
from ray_dwm.models.folders import load_dwm
from ray_dwm.selection.dwm import Encoded
from ray_dwm.selection.method import Arrays

SEQUENCES = 512
ROUNDS = 16
_TURNS = 500
_CONVERGED = 1e-10


@dataclass(frozen=True, slots=True)
class Joint:
    """Variance of a sequence's log relative weight, in three parts."""

    sequence: float
    """Between sequences: what a sequence's weight is on the whole."""
    batch: float
    """Of the level of the batches: who competes with better ones gets less. Any relative weight has this part."""
    company: float
    """What is left: how differently a sequence is judged in other company. 0 where each is scored by itself."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.sequence + self.batch + self.company


def versions(run: Run, phases: Sequence[Span]) -> list[Path]:
    """The DWM folder that was applied in the middle of each phase.

    Raises:
        DataError: the run has none that could weigh a sequence without its LM; saying why.
    """
    if run.config.weighting.method != "dwm":
        raise DataError(f"weighting.method={run.config.weighting.method} has no DWM")
    entries = _entries(run)
    folders = []
    for phase in phases:
        fraction = (phase.first_step + phase.last_step) / 2 / run.config.train.steps
        known = [entry for entry in entries if entry.fraction <= fraction] or entries[:1]
        folders.append(known[-1].folder)
    for folder in set(folders):
        if load_dwm(folder)[0].shape.lm_features:
            raise DataError("the DWM looks at the LM's loss and entropy (dwm.lm_features), and the LM of then is gone")
    return folders


def _entries(run: Run) -> list[Entry]:
    dwm = run.config.dwm
    match dwm.mode:
        case "frozen":
            return [Entry(0.0, Path(dwm.init_from).expanduser())]
        case "replay":
            return read_trajectory(Path(dwm.trajectory).expanduser())
        case _:
            return read_trajectory(run.folder / "dwm")


def probe_rows(pool: Manifest, batch: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random rows of the pool, ascending: SEQUENCES, or as many whole batches as that takes, at least two.

    Raises:
        DataError: the pool has no two batches, so that company could not change.
    """
    count = batch * min(max(2, -(-SEQUENCES // batch)), pool.rows // batch)
    if count < 2 * batch:
        raise DataError(f"the training set has {pool.rows} sequences, which are no two batches of {batch}")
    return np.sort(rng.choice(pool.rows, size=count, replace=False)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class EncodedByAll:
    """What the joint head of each of some DWMs needs of rows: "0", "1", ..., (n, D + 1)."""

    folders: tuple[str, ...]
    seq_len: int

    def __call__(self, rows: Rows) -> Arrays:
        rows = Rows(rows.sample_ids, rows.domains, rows.input_ids[:, : self.seq_len])
        return {str(k): Encoded(folder)(rows)["encoded"] for k, folder in enumerate(self.folders)}


def draws(rows: int, batch: int, rounds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random partitions of the rows into batches, (R, rows / B, B)."""
    order = rng.permuted(np.tile(np.arange(rows), (rounds, 1)), axis=1)
    return order.reshape(rounds, -1, batch)


@torch.no_grad()
def log_weights(
    model: DataWeightingModel, encoded_nE: NDArray[np.float32], draws_RbB: NDArray[np.int64], dwm: DwmConfig
) -> Floats:
    """Log relative weight, log(B w), of every sequence in every draw, (n, R)."""
    encoded = torch.from_numpy(encoded_nE)
    found_nR = np.empty((len(encoded_nE), len(draws_RbB)))
    for column, batches_bB in enumerate(draws_RbB):
        for rows_B in batches_bB:
            scores_B = model.scores(encoded[rows_B]).double()
            weights_B = weights_from_scores(scores_B, dwm.temperature, dwm.floor)
            found_nR[rows_B, column] = log_relative(weights_B).numpy()
    return found_nR


def joint(log_weights_nR: Floats, draws_RbB: NDArray[np.int64]) -> Joint:
    """Fit log weight = sequence + batch + rest by least squares, and say how large each part is.

    The parts are freed of what noise alone puts into them: the rest has n R - n - b + 1 degrees of freedom with b
    batches in all, and R-th and B-th parts of its variance are in the means that sequences and batches are fitted by.
    """
    n, rounds = log_weights_nR.shape
    places_nR = np.empty((n, rounds), dtype=np.int64)
    numbers = np.arange(draws_RbB.shape[0] * draws_RbB.shape[1]).reshape(draws_RbB.shape[:2])
    for column, batches_bB in enumerate(draws_RbB):
        places_nR[batches_bB, column] = numbers[column][:, None]
    size, batches = draws_RbB.shape[2], numbers.size
    values_nR = log_weights_nR - log_weights_nR.mean()
    of_batch_b = np.zeros(batches)
    for _ in range(_TURNS):  # each part in turn, given the other
        of_sequence_n = (values_nR - of_batch_b[places_nR]).mean(axis=1)
        left_nR = values_nR - of_sequence_n[:, None]
        fitted_b = np.bincount(places_nR.ravel(), left_nR.ravel()) / size
        change, of_batch_b = float(np.abs(fitted_b - of_batch_b).max()), fitted_b
        if change < _CONVERGED:
            break
    rest_nR = values_nR - of_sequence_n[:, None] - of_batch_b[places_nR]
    company = float((rest_nR**2).sum()) / (n * rounds - n - batches + 1)
    return Joint(
        sequence=max(0.0, float(of_sequence_n.var(ddof=1)) - company / rounds),
        batch=max(0.0, float(of_batch_b.var(ddof=1)) - company / size),
        company=company,
    )


def stability(log_weights_PnR: Floats, resamples: int, rng: np.random.Generator) -> Matrix:
    """Spearman's correlation of the sequences' mean log weights between phases.

    Always between the even draws of one and the odd draws of the other, mean of both ways: the same draws would have
    the same company, which is no property of a sequence. On the diagonal stands what two phases of one DWM would reach.
    NaN where a phase weighs all alike. The bootstrap resamples sequences with the ranks that they have.
    """
    phases, n, _ = log_weights_PnR.shape
    even_Pn, odd_Pn = (ranks(log_weights_PnR[:, :, first::2].mean(axis=2)) for first in (0, 1))
    drawn_Rn = rng.integers(n, size=(resamples, n))
    matrix = Matrix.empty(phases)
    for a in range(phases):
        for b in range(a, phases):
            ways = ((even_Pn[a], odd_Pn[b]), (even_Pn[b], odd_Pn[a]))
            rho_R = np.mean([correlation(left_n[drawn_Rn], right_n[drawn_Rn]) for left_n, right_n in ways], axis=0)
            matrix.put(a, b, float(np.mean([correlation(left_n, right_n) for left_n, right_n in ways])), rho_R)
    return matrix
