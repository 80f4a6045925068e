"""selection.json: what a selection was made of, and what it did to each domain."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.manifest import Manifest
from ray_dwm.selection.method import Scored

RECORD = "selection.json"
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


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


def table(record: dict[str, Any]) -> str:
    """The domains for people."""
    lines = [f"{'domain':<16}{'tokens before':>16}{'after':>14}{'share before':>14}{'after':>8}"]
    for name, d in record["domains"].items():
        lines.append(
            f"{name:<16}{d['tokens_pool']:>16,}{d['tokens_selected']:>14,}{d['share_pool']:>14.1%}"
            f"{d['share_selected']:>8.1%}"
        )
    tokens = record["tokens"]
    lines.append(f"{'all':<16}{tokens['pool']:>16,}{tokens['selected']:>14,}")
    return "\n".join(lines)
