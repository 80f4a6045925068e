"""selection.json: what a selection was made of, and what it did to each domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.manifest import Manifest
from ray_dwm.selection.method import Scored

RECORD = "selection.json"
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_COLUMNS = ("tokens_pool", "share_pool", "tokens_selected", "share_selected")


def describe(pool: Manifest, scored: Scored, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Quantiles of the scores and tokens of every domain, before and after."""
    chosen = np.zeros(len(scored), dtype=bool)
    chosen[rows] = True
    return {
        "sequences": {"pool": len(scored), "selected": len(rows)},
        "tokens": {"pool": len(scored) * pool.seq_len, "selected": len(rows) * pool.seq_len},
        "scores": {"pool": quantiles(scored.scores), "selected": quantiles(scored.scores[chosen])},
        "domains": {
            name: _domain(pool, scored, chosen, scored.domains == code) for code, name in enumerate(pool.domain_names)
        },
    }


def quantiles(scores: NDArray[np.float64]) -> dict[str, float]:
    """Quantile -> score."""
    values = np.quantile(scores, _QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(_QUANTILES, values, strict=True)}


def _domain(
    pool: Manifest, scored: Scored, chosen: NDArray[np.bool_], inside: NDArray[np.bool_]
) -> dict[str, float | None]:
    before, after = int(inside.sum()), int((inside & chosen).sum())
    return {
        "tokens_pool": before * pool.seq_len,
        "tokens_selected": after * pool.seq_len,
        "share_pool": before / len(scored),
        "share_selected": after / int(chosen.sum()),
        "mean_score": float(scored.scores[inside].mean()) if before else None,
    }


def opening(method: str, pool: Manifest, rows: int, targets: Iterable[str]) -> str:
    """What is about to be selected, for people."""
    sets, tokens = ", ".join(targets), f"{rows * pool.seq_len:,} of {pool.rows * pool.seq_len:,} tokens"
    whom = f"for {sets}" if sets else "without a target set"
    return f"{method}: {rows:,} of {pool.rows:,} sequences, {tokens}, {whom}"


def table(record: dict[str, Any]) -> str:
    """The domains for people."""
    lines = [f"{'domain':<16}{'pool, tokens':>18}{'share':>8}{'selected, tokens':>20}{'share':>8}{'taken':>8}"]
    rows = [(name, *(d[key] for key in _COLUMNS)) for name, d in record["domains"].items()]
    rows.append(("all", record["tokens"]["pool"], 1.0, record["tokens"]["selected"], 1.0))
    for name, before, share_before, after, share_after in rows:
        lines.append(
            f"{name:<16}{before:>18,}{share_before:>8.1%}{after:>20,}{share_after:>8.1%}{after / before:>8.1%}"
        )
    return "\n".join(lines)
