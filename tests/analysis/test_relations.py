"""Planted relations between weights and features are found in their phases; none are found in noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_dwm.analysis.phases import Batches, Sample, Span
from ray_dwm.analysis.relations import Groups, relations

STEPS, SIZE = 15, 32
SPANS = [Span("early", 1, STEPS), Span("middle", STEPS + 1, 2 * STEPS), Span("late", 2 * STEPS + 1, 3 * STEPS)]
NAMES = ("a", "b", "c", "d")
SLOPES = {"rising": (0.0, 0.5, 1.0), "falling": (-1.0, -1.0, -1.0), "noise": (0.0, 0.0, 0.0)}
"""Of log weights, in each phase."""


def planted(seed: int, slopes: dict[str, tuple[float, float, float]], of_domain: float = 0.0) -> dict[str, Any]:
    """Weights are exp(sum of slope times feature + noise + of_domain times the domain's number), over the batch's."""
    rng, shape = np.random.default_rng(seed), (3 * STEPS, SIZE)
    phases = np.repeat(np.arange(3), STEPS)
    features = {name: rng.standard_normal(shape) for name in SLOPES}
    domains = rng.integers(len(NAMES), size=shape)
    logs = rng.standard_normal(shape) + of_domain * domains
    for name, of_phase in slopes.items():
        logs += np.array(of_phase)[phases][:, None] * features[name]
    weights = np.exp(logs)
    batches = Batches(
        steps_S=np.arange(1, 3 * STEPS + 1),
        ids_SB=rng.integers(10**6, size=shape),
        domains_SB=domains,
        names=NAMES,
        losses_SB=rng.standard_normal(shape),
        weights_SB=weights / weights.mean(axis=1, keepdims=True),
    )
    return relations(Sample(SPANS, batches, phases), features, {"domain": Groups(domains, NAMES)}, rng)


def rho(slope: float, others: float) -> float:
    """Spearman's correlation of normals whose correlation is slope / sqrt(slope^2 + others)."""
    return 6 / np.pi * np.arcsin(slope / np.sqrt(slope**2 + others) / 2)


def test_planted_slopes_are_recovered_with_intervals() -> None:
    found = planted(0, SLOPES)
    for name, of_phase in SLOPES.items():
        for span, slope in zip(SPANS, of_phase, strict=True):
            others = 1 + sum(SLOPES[other][SPANS.index(span)] ** 2 for other in SLOPES if other != name)
            for table in ("features", "features_within_domains"):
                estimate = found[table][name][span.name]
                assert estimate["steps"] == STEPS
                assert estimate["low"] - 0.02 < rho(slope, others) < estimate["high"] + 0.02, (name, span, table)
                assert (estimate["low"] > 0) == (slope > 0) and (estimate["high"] < 0) == (slope < 0)


def test_the_feature_whose_effect_changes_is_named() -> None:
    differ = planted(1, SLOPES)["phases_differ"]
    assert differ["p"] == 1 / (1 + differ["permutations"]) == differ["of"]["rising"]["p"]
    assert min(differ["of"][name]["p"] for name in differ["of"] if name not in ("rising", "falling")) > 0.05
    assert differ["of"]["rising"]["share"] > 0.5 and differ["block_steps"] == 2


def test_weights_that_say_nothing() -> None:
    """Over seeds, p is spread out and intervals miss 0 about as often as they may."""
    null, missed, count = [], 0, 0
    for seed in range(8):
        found = planted(seed, {})
        null.append(found["phases_differ"]["p"])
        for of_phase in found["features"].values():
            missed += sum(not e["low"] <= 0 <= e["high"] for e in of_phase.values())
            count += len(of_phase)
    assert np.mean(np.array(null) < 0.05) <= 1 / 8 and np.mean(null) > 0.25
    assert missed / count < 0.12  # of 72


def test_domains() -> None:
    found = planted(2, {}, of_domain=1.0)
    weights = {name: found["weights"]["domain"][name]["late"] for name in NAMES}
    values = [weights[name]["value"] for name in NAMES]
    assert values == sorted(values) and values[0] < 0.3 and values[-1] > 1.5
    assert all(w["low"] < w["value"] < w["high"] for w in weights.values())
    assert found["explained"]["domain"]["early"]["low"] > 0.3
    assert found["domain_stability"]["domains"] == len(NAMES)
    assert found["domain_stability"]["value"] == [[None, 1, 1], [1, None, 1], [1, 1, None]]
    # A phase's mean weight is that of its sequences: all domains together make the mean of 1.
    none = planted(3, {})["explained"]["domain"]["middle"]
    assert none["low"] < 0.03 and abs(none["value"]) < 0.06


def test_within_domains_what_domains_do_is_taken_out() -> None:
    """A feature that is the domain's number and some noise: all of its correlation goes through the domain."""
    rng, shape = np.random.default_rng(4), (3 * STEPS, SIZE)
    domains = rng.integers(len(NAMES), size=shape)
    feature, logs = (domains + 0.1 * rng.standard_normal(shape) for _ in range(2))
    batches = Batches(
        steps_S=np.arange(3 * STEPS),
        ids_SB=domains,
        domains_SB=domains,
        names=NAMES,
        losses_SB=feature,
        weights_SB=np.exp(logs),
    )
    taken = Sample(SPANS, batches, np.repeat(np.arange(3), STEPS))
    found = relations(taken, {"it": feature}, {"domain": Groups(domains, NAMES)}, rng)
    for span in SPANS:
        assert found["features"]["it"][span.name]["low"] > 0.8
        within = found["features_within_domains"]["it"][span.name]
        assert within["low"] < 0.1 and abs(within["value"]) < 0.15


@pytest.mark.parametrize("there", [5, 12])
def test_a_domain_that_is_rarely_there_has_no_interval(there: int) -> None:
    rng, shape = np.random.default_rng(5), (3 * STEPS, SIZE)
    domains = np.zeros(shape, dtype=np.int64)
    domains[:there, 0] = 1  # of the early steps
    weights = np.exp(rng.standard_normal(shape))
    batches = Batches(
        steps_S=np.arange(3 * STEPS),
        ids_SB=domains,
        domains_SB=domains,
        names=("often", "rare"),
        losses_SB=weights,
        weights_SB=weights,
    )
    taken = Sample(SPANS, batches, np.repeat(np.arange(3), STEPS))
    found = relations(taken, {"it": weights}, {"domain": Groups(domains, ("often", "rare"))}, rng)
    rare = found["weights"]["domain"]["rare"]
    assert rare["early"]["steps"] == there and (rare["early"]["low"] is None) == (there < 10)
    assert rare["late"] == {"value": None, "low": None, "high": None, "steps": 0}
    assert found["domain_stability"] is None
