"""Warnings of a report: what must be known before its figures are believed, each by a stated threshold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ray_dwm.analysis.comparison import differences
from ray_dwm.analysis.data_card import passes
from ray_dwm.analysis.grid import Grid
from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.statistics import Interval
from ray_dwm.config.sections import MAX_OVERLAP
from ray_dwm.data.plan import WORTH_EPOCHS
from ray_dwm.engine.messages import MESSAGES
from ray_dwm.evaluation.contamination import Overlap
from ray_dwm.evaluation.scores import read_overlaps

NEAR_GUARD = 2.0
"""ESS warns at so many times dwm.min_ess_fraction, at which the guard stops a DWM's run."""
LOW_FIDELITY = 0.8
"""Of the median check, a cosine."""
WORSE = 0.01
"""Nats per token, 1 % of perplexity: what a held-out loss must rise where no seeds say what chance does."""


@dataclass(frozen=True, slots=True)
class Caution:
    """One warning."""

    title: str
    found: str
    """What was measured, and where."""
    rule: str
    """When this is said."""
    about: str = ""
    """Of which sets, where a run may have several of this title."""


def low_ess(steps: Sequence[float], ess: Sequence[float], batch: int, guard: float) -> Caution | None:
    """Whether weights came near to collapse: (ESS - 1) / (B - 1), as the guard has it, at its lowest.

    Args:
        batch: B, sequences of a global batch.
        guard: dwm.min_ess_fraction.
    """
    shares = [(value - 1) / (batch - 1) if batch > 1 else 1.0 for value in ess]
    least = NEAR_GUARD * guard
    low = [(share, step) for share, step in zip(shares, steps, strict=True) if share < least]
    if not low:
        return None
    share, step = min(low)
    return Caution(
        "Low effective sample size",
        f"at its lowest, step {step:g}, ESS was at {share:.1%} of its range; it was low in {len(low)} of {len(shares)} "
        "steps: few sequences made the gradient",
        f"(ESS - 1) / (B - 1) below {least:.3g}, {NEAR_GUARD:g} times dwm.min_ess_fraction",
    )


def low_fidelity(values: Sequence[float], least: float) -> Caution | None:
    """Whether the estimator's alignments were unlike a better one's.

    Args:
        least: bilevel.min_fidelity; where it is 0, LOW_FIDELITY.
    """
    least = least or LOW_FIDELITY
    if not values or median(values) >= least:
        return None
    return Caution(
        "Low fidelity",
        f"the median of {len(values)} checks is {median(values):.2f}: the DWM learnt from alignments that a better "
        "estimator does not share",
        f"median cosine below {least:g}",
    )


def turned(name: str, target: Mapping[float, float], held_out: Mapping[float, float]) -> Caution | None:
    """Whether within a run a held-out loss rose from its lowest point on while the target loss still fell.

    Args:
        target, held_out: step -> loss.
    """
    shared = sorted(target.keys() & held_out.keys())
    if len(shared) < 2:
        return None
    lowest, last = min(shared, key=lambda step: held_out[step]), shared[-1]
    rise, fall = held_out[last] - held_out[lowest], target[last] - target[lowest]
    if rise <= WORSE or fall >= 0:
        return None
    return Caution(
        "Target overfitted",
        f"since step {lowest:g} the loss on {name} rose by {rise:.4f} nats per token, while the target loss fell by "
        f"{-fall:.4f}",
        f"a held-out loss more than {WORSE:g} nats per token above its lowest while the target improves",
    )


def traded(uniform: Mapping[str, float], weighted: Mapping[str, float], held_out: Iterable[str]) -> list[Caution]:
    """Held-out sets that are worse than with uniform weights, where the target is better: of one pair of runs.

    Args:
        uniform, weighted: set -> last loss.
    """
    if not {"target"} <= uniform.keys() & weighted.keys():
        return []
    gain = weighted["target"] - uniform["target"]
    names = [name for name in held_out if name in uniform and name in weighted]
    losses = {name: weighted[name] - uniform[name] for name in names}
    return [
        Caution(
            "Target overfitted",
            f"against uniform weights the target loss is {-gain:.4f} nats per token lower, that on {name} {loss:.4f} "
            "higher: what was gained is the target's",
            f"target better and a held-out set worse by more than {WORSE:g} nats per token; one pair, no interval",
        )
        for name, loss in losses.items()
        if gain < 0 and loss > WORSE
    ]


def traded_over_seeds(target: Interval, others: Mapping[str, Interval]) -> list[Caution]:
    """The same of several seeds: both differences, method less baseline, with intervals that leave out 0."""
    if not (target.excludes(0.0) and target.mean < 0):
        return []
    return [
        Caution(
            "Target overfitted",
            f"against the baseline the target loss is {-target.mean:.4f} nats per token lower, that on {name} "
            f"{of.mean:.4f} higher",
            "target better and a held-out set worse, both with 95 % intervals that leave out 0",
        )
        for name, of in others.items()
        if of.excludes(0.0) and of.mean > 0
    ]


def contaminated(found: Iterable[Overlap]) -> list[Caution]:
    """Sets that overlap with another by more than they may."""
    return [
        Caution(
            "Contamination",
            f"{one.share:.2%} of {one.what} are also in {one.against}: its figures flatter",
            f"overlap above {MAX_OVERLAP:.2%}",
            f"{one.what} in {one.against}",
        )
        for one in found
        if one.share > MAX_OVERLAP
    ]


def repeated(part: str, times: float) -> Caution | None:
    """Whether the data ran out: a part of training that read its sequences more than once."""
    if times <= 1:
        return None
    worth = f", and beyond {WORTH_EPOCHS:g} that is worth little" if times > WORTH_EPOCHS else ""
    return Caution(
        "Data ran out", f"{part} read its sequences {times:.2f} times{worth}", "more than one epoch of the training set"
    )


def said(lines: Iterable[str]) -> list[Caution]:
    """What the run itself warned of, from the lines of messages.log."""
    texts = dict.fromkeys(line.partition("warning: ")[2].strip() for line in lines if "warning: " in line)
    return [Caution("Said during the run", text, f"a warning in {MESSAGES}") for text in texts]


def of_run(run: Run) -> list[Caution]:
    """All warnings of one run."""
    config = run.config
    points = {key: dict(zip(*run.series(key, "step"), strict=True)) for key in run.keys("val/")}
    target = points.get("val/target/loss", {})
    ess, fidelity = run.series("dwm/ess", "step"), run.series("dwm/fidelity", "step")
    found = [
        low_ess(*ess, config.train.global_batch, config.dwm.min_ess_fraction),
        low_fidelity(fidelity[1], config.bilevel.min_fidelity),
        *(turned(name, target, points.get(f"val/{name}/loss", {})) for name in held_out(run)),
        *contaminated(read_overlaps(run.folder)),
        *said(path.read_text(errors="replace").splitlines() if (path := run.folder / MESSAGES).is_file() else ()),
        *(repeated(part, times) for part, times in passes(run)),
    ]
    return [one for one in found if one is not None]


def held_out(run: Run) -> list[str]:
    """Sets that the run was evaluated on and learnt nothing from."""
    names = [key.removeprefix("val/").removesuffix("/loss") for key in run.keys("val/")]
    return [name for name in names if name not in run.config.data.target_sets]


@dataclass(frozen=True, slots=True)
class Group:
    """Warnings of one kind, as a page shows them."""

    title: str
    rule: str
    found: dict[str, list[str]]
    """What was measured -> whose it is."""


def grouped(cautions: Iterable[tuple[str, Caution]]) -> list[Group]:
    """Warnings by kind, and those that say the same once."""
    groups: dict[tuple[str, str], Group] = {}
    for whose, one in cautions:
        group = groups.setdefault((one.title, one.rule), Group(one.title, one.rule, {}))
        group.found.setdefault(one.found, []).append(whose)
    return list(groups.values())


def of_runs(runs: Sequence[Run], baseline: Run | None) -> list[tuple[str, Caution]]:
    """(whose, warning) of all runs of a report, those of pairs with uniform weights included."""
    found = []
    for run in runs:
        found += [(run.name, one) for one in of_run(run)]
        if baseline is not None and run.weighted:
            found += [(run.name, one) for one in traded(_finals(baseline), _finals(run), held_out(run))]
    return found


def _finals(run: Run) -> dict[str, float]:
    return {key.removeprefix("val/").removesuffix("/loss"): loss for key, loss in run.summary["final"].items()}


def of_grid(grid: Grid) -> list[tuple[str, Caution]]:
    """(whose, warning) of an experiment: a cell's once for all seeds that have it, with the first of them as it is."""
    found = []
    for size in grid.experiment.sizes:
        for method in grid.experiment.methods:
            runs = [outcome.run for outcome in grid.of(size, method).values()]
            name = grid.experiment.label(method)
            whose = f"{size}, {name}" if len(grid.experiment.sizes) > 1 else name
            found += [(whose, one) for one in _merged([of_run(run) for run in runs])]
            if method != grid.experiment.baseline and runs:
                gaps = differences(grid, size, method, grid.experiment.baseline)
                others = {name: gaps[name] for name in held_out(runs[0]) if name in gaps}
                if "target" in gaps:
                    found += [(whose, one) for one in traded_over_seeds(gaps["target"], others)]
    return found


def _merged(of_seeds: Sequence[Sequence[Caution]]) -> list[Caution]:
    """The first of each title and sets, the second, and so on: the first seed that has it stands for all."""
    same: dict[tuple[str, str, int], list[Caution]] = {}
    for cautions in of_seeds:
        seen: Counter[tuple[str, str]] = Counter()
        for one in cautions:
            kind = (one.title, one.about)
            same.setdefault((*kind, seen[kind]), []).append(one)
            seen[kind] += 1
    return [
        dataclasses.replace(having[0], found=f"in {len(having)} of {len(of_seeds)} seeds; {having[0].found}")
        for having in same.values()
    ]
