"""What preferences.html shows of one weighted run: figures, and numbers in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray_dwm.analysis import preference_figures as figures
from ray_dwm.analysis.favoured import Texts, extremes
from ray_dwm.analysis.features import FEATURES
from ray_dwm.analysis.phases import spans, weighted_batches
from ray_dwm.analysis.runs import Run

SIGNIFICANT = 0.05
_TITLES = {f.name: f.title for f in FEATURES}


def section(run: Run, found: Mapping[str, Any] | str) -> dict[str, Any]:
    """The section's content.

    Args:
        found: the numbers of preferences.json, or why there are none.
    """
    learnt = run.config.learns_dwm
    if isinstance(found, str):
        batches = weighted_batches(run)
        texts = extremes(batches, spans(run.config, batches.steps_S), Texts(run.config.data.train))
        return {"run": run.name, "reason": found, "phases": [asdict(phase) for phase in texts]}
    return {
        "run": run.name,
        "learnt": learnt,
        "level": f"{found['level']:.0%}".replace("%", " %"),
        "verdict": verdict(found["phases_differ"]),
        "joint": joint(found["probe"]),
        "correlations": figures.correlations(found),
        "cards": _cards(found),
        "left_out": [f"{_TITLES.get(name, name)} ({reason})" for name, reason in found["left_out"].items()],
        "phases": found["phases"],
    }


def verdict(differ: Mapping[str, Any]) -> str:
    """Whether phases differ, in one sentence."""
    if differ["p"] >= SIGNIFICANT:
        return f"The phases do not differ beyond chance: p = {differ['p']:.2g}."
    shares = {name: of["share"] for name, of in differ["of"].items() if of["share"] is not None}
    most = max(shares, key=lambda name: shares[name])
    return (
        f"The phases differ beyond chance: p = {differ['p']:.2g}; most in {_TITLES.get(most, most)}, where "
        f"{_percent(shares[most])} of the variance between steps lies between phases."
    )


def joint(probe: Mapping[str, Any] | None) -> str:
    """How much a weight depends on its batch, in one sentence."""
    if probe is None:
        return ""
    parts = {phase: (of["company"], of["batch"], sum(of.values())) for phase, of in probe["joint"].items()}
    parts = {phase: of for phase, of in parts.items() if of[2] > 0}
    if not parts:
        return "The DWM weighed all of the probe alike."
    last = list(parts)[-1]
    _, batch, total = parts[last]
    of_all = ", ".join(f"{_percent(of[0] / of[2])} ({phase})" for phase, of in parts.items())
    return (
        f"Weighed again in random batches of {probe['batch']}, of the variance of a sequence's log weight {of_all} lie "
        f"in how it is judged in its company; {last}, {_percent(batch / total)} lie in the level of the batch and the "
        "rest in the sequence itself."
    )


def _percent(share: float) -> str:
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _cards(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, figure, note) of what stands beside each other below the correlations."""
    phases, cards = [phase["name"] for phase in found["phases"]], []
    for kind, table in found["weights"].items():
        shares = found["explained"][kind]
        parts = ", ".join(f"{phase} {_percent(max(0.0, e['value'] or 0.0))}" for phase, e in shares.items())
        note = f"Part of the variance of ranks that lies between {kind}s, beyond chance: {parts}."
        cards.append((f"Weight by {kind}", figures.group_weights(table), note))
    if (probe := found["probe"]) is not None:
        note = (
            f"Spearman's correlation of the weights that {probe['sequences']} random sequences get, mean over "
            f"{probe['draws']} batches each, by the DWM in the middle of each phase; on the diagonal between two "
            "halves of the batches."
        )
        cards.append(("Do the phases agree on sequences?", figures.stability(probe["stability"], phases), note))
    elif (matrix := found["domain_stability"]) is not None:
        note = f"Spearman's correlation of the mean weights of {matrix['domains']} domains."
        cards.append(("Do the phases agree on domains?", figures.stability(matrix, phases), note))
    return cards
