"""The recorded weights of a run as batches, its phases, and a sample of batches from each.

Legend: S = recorded steps, B = sequences of the global batch, r = of those the ones that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_dwm.analysis.ranks import Floats
from ray_dwm.analysis.resampling import LEAST_STEPS
from ray_dwm.analysis.runs import Run
from ray_dwm.config import RunConfig
from ray_dwm.core.schedules import Staged
from ray_dwm.engine.weigher import schedule
from ray_dwm.errors import UserError

THIRDS = ("early", "middle", "late")
MOST_ROWS = 64
"""Sequences of a batch that are looked at: a larger batch says little more of how its weights are ranked."""
_EQUAL = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Recorded steps with their sequences."""

    steps_S: NDArray[np.int64]
    """Ascending."""
    ids_SB: NDArray[np.int64]
    domains_SB: NDArray[np.int64]
    """Codes into `names`."""
    names: tuple[str, ...]
    losses_SB: Floats
    """Of the LM before the step, nats per token."""
    weights_SB: Floats
    """1 is uniform."""

    def take(self, steps: NDArray[np.integer], columns: NDArray[np.integer] | None = None) -> Batches:
        """Some of the steps, by number, and of each some columns, (steps, r)."""

        def of(values_SB: NDArray[Any]) -> NDArray[Any]:
            part = values_SB[steps]
            return part if columns is None else np.take_along_axis(part, columns, axis=1)

        return Batches(
            steps_S=self.steps_S[steps],
            ids_SB=of(self.ids_SB),
            domains_SB=of(self.domains_SB),
            names=self.names,
            losses_SB=of(self.losses_SB),
            weights_SB=of(self.weights_SB),
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of training."""

    name: str
    first_step: int
    last_step: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Batches of every phase, in the order of steps."""

    spans: list[Span]
    batches: Batches
    """(S, r)."""
    phases_S: NDArray[np.int64]
    """Which of the spans each step is in."""


def weighted_batches(run: Run) -> Batches:
    """The recorded steps whose weights differ: before its first version a DWM weighs uniformly, and prefers nothing.

    Raises:
        UserError: what is recorded is damaged.
    """
    batches = _batches(run)
    return batches.take(np.flatnonzero(np.ptp(batches.weights_SB, axis=1) > _EQUAL))


def _batches(run: Run) -> Batches:
    table = run.weights()
    try:
        table = table.select(["step", "sample_id", "domain", "loss", "weight"])
        domain = table["domain"].combine_chunks().dictionary_encode()
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{run.folder / 'weights'} is damaged ({str(error).splitlines()[0]})") from None
    steps, counts = np.unique(table["step"].to_numpy(), return_counts=True)
    if (counts != counts[0]).any():
        odd = int(np.flatnonzero(counts != counts[0])[0])
        raise UserError(
            f"{run.folder / 'weights'} has {counts[odd]} sequences of step {steps[odd]} and {counts[0]} of step "
            f"{steps[0]}: it is damaged"
        )
    order, shape = np.argsort(table["step"].to_numpy(), kind="stable"), (len(steps), int(counts[0]))
    names = sorted(domain.dictionary.to_pylist())
    codes = np.array([names.index(name) for name in domain.dictionary.to_pylist()], dtype=np.int64)
    columns = {name: table[name].to_numpy()[order].reshape(shape) for name in ("sample_id", "loss", "weight")}
    return Batches(
        steps_S=steps,
        ids_SB=columns["sample_id"],
        domains_SB=codes[domain.indices.to_numpy()][order].reshape(shape),
        names=tuple(names),
        losses_SB=columns["loss"].astype(np.float64),
        weights_SB=columns["weight"].astype(np.float64),
    )


def spans(config: RunConfig, steps_S: NDArray[np.int64]) -> list[Span]:
    """The stages of a run that learns its DWM in stages, else thirds of the weighted steps, if there are any."""
    if not len(steps_S):
        return []
    plan = schedule(config) if config.learns_dwm else None
    if isinstance(plan, Staged):
        starts = [*map(plan.start, range(plan.stages)), config.train.steps]
        return [Span(f"stage {k + 1}", starts[k] + 1, starts[k + 1]) for k in range(plan.stages)]
    edges = np.linspace(steps_S[0], steps_S[-1] + 1, num=len(THIRDS) + 1).astype(int).tolist()
    return [Span(name, edges[k], edges[k + 1] - 1) for k, name in enumerate(THIRDS)]


def inside(batches: Batches, span: Span) -> NDArray[np.int64]:
    """Which of the steps are in a phase."""
    return np.flatnonzero((batches.steps_S >= span.first_step) & (batches.steps_S <= span.last_step))


def sample(batches: Batches, phases: list[Span], samples: int, rng: np.random.Generator, run: str) -> Sample:
    """As many steps from every phase, evenly spread, and of each at most MOST_ROWS random sequences.

    Args:
        samples: sequences in all, at most.
        run: whose they are, for errors.

    Raises:
        UserError: too few steps for an interval.
    """
    size = min(batches.ids_SB.shape[1], MOST_ROWS)
    if size < 4:
        raise UserError(f"{run}: batches of {size} sequences are too small, a correlation within them needs 4")
    each, least = samples // (size * len(phases)), LEAST_STEPS * size * len(phases)
    if each < LEAST_STEPS:
        raise UserError(
            f"{run}: --samples is {samples}, and {LEAST_STEPS} steps of {size} sequences from each of {len(phases)} "
            f"phases are {least}: raise it"
        )
    chosen = []
    for phase in phases:
        steps = inside(batches, phase)
        if len(steps) < LEAST_STEPS:
            raise UserError(
                f"{run}: {len(steps)} weighted steps are recorded of phase {phase.name} (steps {phase.first_step} to "
                f"{phase.last_step}), an interval needs {LEAST_STEPS}: train longer or lower tracking.weights_every, "
                "or leave this out (--no-preferences)"
            )
        chosen.append(steps[np.unique(np.linspace(0, len(steps) - 1, min(each, len(steps))).round().astype(int))])
    steps = np.concatenate(chosen)
    columns = rng.permuted(np.tile(np.arange(batches.ids_SB.shape[1]), (len(steps), 1)), axis=1)[:, :size]
    phases_S = np.repeat(np.arange(len(phases)), [len(part) for part in chosen])
    return Sample(phases, batches.take(steps, np.sort(columns, axis=1)), phases_S)
