"""How weights relate to features, domains and sources in each phase: numbers with intervals, from a sample of batches.

Legend: S = steps of all phases, r = sequences of each, n = steps of one phase, R = resamples, P = phases, F = features,
G = groups (domains or sources).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.analysis.phases import Sample
from ray_dwm.analysis.ranks import Codes, Floats, explained, spearman, within_batches
from ray_dwm.analysis.resampling import (
    LEAST_STEPS,
    Estimate,
    Matrix,
    block_draws,
    estimates,
    mean_draws,
    phases_differ,
)

RESAMPLES = 2000
PERMUTATIONS = 1999
_LEAST_GROUPS = 4
"""Below which a rank correlation over groups says nothing."""
_MOST_GROUPS = 20
"""That the permutation test looks at one by one."""


@dataclass(frozen=True, slots=True)
class Groups:
    """What sequences belong to: domains or sources."""

    codes_Sr: Codes
    names: tuple[str, ...]


class Phases:
    """The sample's phases with one set of resamples each, which all numbers of the phase share."""

    def __init__(self, sample: Sample, rng: np.random.Generator) -> None:
        self.names = [span.name for span in sample.spans]
        self._steps = [np.flatnonzero(sample.phases_S == k) for k in range(len(sample.spans))]
        self._draws = [block_draws(len(steps), RESAMPLES, rng) for steps in self._steps]

    def means(self, sums_SF: Floats, counts_SF: Floats) -> tuple[list[list[Estimate]], list[Floats]]:
        """Of every phase the F means over its steps, sums over counts, and their resamples, (R, F)."""
        drawn = [mean_draws(sums_SF[s], counts_SF[s], d) for s, d in zip(self._steps, self._draws, strict=True)]
        found = [estimates(sums_SF[s], counts_SF[s], draws_RF) for s, draws_RF in zip(self._steps, drawn, strict=True)]
        return found, drawn

    def table(self, names: tuple[str, ...], values_SF: Floats) -> dict[str, dict[str, Any]]:
        """Name -> phase -> mean of values over the steps in which they are defined."""
        there_SF = ~np.isnan(values_SF)
        found, _ = self.means(np.where(there_SF, values_SF, 0.0), there_SF.astype(np.float64))
        return by_name(names, self.names, found)


def by_name(names: tuple[str, ...], phases: list[str], found: list[list[Estimate]]) -> dict[str, dict[str, Any]]:
    """Name -> phase -> estimate, as plain values."""
    return {
        name: {phase: asdict(of_phase[place]) for phase, of_phase in zip(phases, found, strict=True)}
        for place, name in enumerate(names)
    }


def relations(
    sample: Sample,
    features: Mapping[str, Floats],
    groups: Mapping[str, Groups],
    rng: np.random.Generator,
    alike: int = 1,
) -> dict[str, Any]:
    """All that is said of how weights relate to what.

    Args:
        features: name -> values, (S, r).
        groups: `domain`, and others that are no finer names of the same.
        alike: recorded steps in a row that one DWM version weighed.
    """
    phases, weights_Sr, domains = Phases(sample, rng), sample.batches.weights_SB, groups["domain"]
    names = tuple(features)
    rho_SF, within_SF = (
        np.stack([within_batches(weights_Sr, features[name], inside) for name in names], axis=1)
        for inside in (None, domains.codes_Sr)
    )
    found: dict[str, Any] = {
        "features": phases.table(names, rho_SF),
        "features_within_domains": phases.table(names, within_SF),
        "explained": phases.table(
            tuple(groups), np.stack([explained(weights_Sr, g.codes_Sr) for g in groups.values()], axis=1)
        ),
        "weights": {},
    }
    for kind, group in groups.items():
        sums_SG, counts_SG = _of_groups(weights_Sr, group)
        means, drawn = phases.means(sums_SG, counts_SG)
        found["weights"][kind] = by_name(group.names, phases.names, means)
        if kind == "domain":
            found["domain_stability"] = _stability(means, drawn)
    tested = {name: rho_SF[:, place] for place, name in enumerate(names)}
    if 1 < len(domains.names) <= _MOST_GROUPS:
        tested |= {f"domain {name}": _membership(weights_Sr, domains, g) for g, name in enumerate(domains.names)}
    found["phases_differ"] = _difference(tested, sample.phases_S, rng, alike)
    return found


def _of_groups(weights_Sr: Floats, group: Groups) -> tuple[Floats, Floats]:
    """Sum of weights and count of sequences of each group in each step, (S, G)."""
    steps, size = len(weights_Sr), len(group.names)
    keys = (np.arange(steps)[:, None] * size + group.codes_Sr).ravel()
    sums, counts = (np.bincount(keys, of, minlength=steps * size) for of in (weights_Sr.ravel(), None))
    return sums.reshape(steps, size), counts.reshape(steps, size).astype(np.float64)


def _membership(weights_Sr: Floats, group: Groups, code: int) -> Floats:
    """Rank correlation of weights with belonging to a group, (S,)."""
    return within_batches(weights_Sr, (group.codes_Sr == code).astype(np.float64))


def _difference(
    tested: Mapping[str, Floats], phases_S: NDArray[np.int64], rng: np.random.Generator, alike: int
) -> dict[str, Any]:
    found = phases_differ(np.stack(list(tested.values()), axis=1), phases_S, PERMUTATIONS, rng, alike)
    of = {
        name: {"share": None if np.isnan(share) else float(share), "p": float(p)}
        for name, share, p in zip(tested, found.shares_F, found.p_F, strict=True)
    }
    return {"p": found.p, "permutations": found.permutations, "block_steps": found.block, "of": of}


def _stability(means: list[list[Estimate]], drawn: list[Floats]) -> dict[str, Any] | None:
    """Spearman's correlation of the domains' mean weights between phases; None where there are too few domains."""
    known = [g for g in range(len(means[0])) if all(of_phase[g].steps >= LEAST_STEPS for of_phase in means)]
    if len(known) < _LEAST_GROUPS:
        return None
    values_PG = np.array([[of_phase[g].value for g in known] for of_phase in means])
    matrix = Matrix.empty(len(means))
    for a, left_RG in enumerate(drawn):
        for b in range(a + 1, len(drawn)):
            rho_R = spearman(left_RG[:, known], drawn[b][:, known])
            matrix.put(a, b, float(spearman(values_PG[a], values_PG[b])), rho_R)
    return {"domains": len(known), **matrix.plain()}
