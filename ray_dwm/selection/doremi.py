"""DoReMi's last step: a pool resampled to learnt domain weights (Xie et al. 2023, arXiv 2305.10429, section 2).

Learning them is work for LMs: engine/group_dro.py plays the game, orchestration/doremi.py runs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.errors import DataError
from ray_dwm.selection.choose import highest_of_each, quotas
from ray_dwm.selection.method import Scored, Task

FILE = "domain_weights.json"


def depends(options: SelectionConfig) -> dict[str, Any]:
    """See Method.depends: its scores are random ones."""
    del options
    return {}


def choose(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """As many rows of each domain as its weight says, those of the highest (random) scores, ascending.

    No row is taken twice: what a domain lacks goes to the others in proportion to their weights.
    """
    assert task.domain_weights is not None
    weights = np.array([task.domain_weights[name] for name in task.pool.domain_names])
    return highest_of_each(scored, quotas(weights, count, _rows(task.pool)))


def _rows(pool: Manifest) -> NDArray[np.int64]:
    return np.array([pool.domains[name].rows for name in pool.domain_names])


def shares(pool: Manifest) -> dict[str, float]:
    """Every domain's part of the pool's sequences."""
    return {name: pool.domains[name].rows / pool.rows for name in pool.domain_names}


def short(weights: Mapping[str, float], count: int, pool: Manifest) -> list[str]:
    """Domains with fewer rows than their weights ask for, each with what is there and what is asked."""
    return [
        f"{name} ({pool.domains[name].rows} of {math.ceil(weights[name] * count)})"
        for name in pool.domain_names
        if pool.domains[name].rows < math.floor(weights[name] * count)
    ]


def read_weights(path: Path, pool: Manifest) -> dict[str, float]:
    """Domain weights from a JSON file, normalised to sum 1: a domain_weights.json, or plainly domain -> weight.

    Raises:
        DataError: the file is damaged, or names other domains than the pool's.
    """
    try:
        content = json.loads(path.read_text())
        nested = content.get("weights")  # a domain may be called so
        plain = nested if isinstance(nested, dict) else content
        weights = {str(name): _weight(value) for name, value in dict(plain).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"selection.doremi.weights: {path} cannot be read ({str(error).splitlines()[0]}): it must be a JSON "
            'object, domain -> weight, as {"web": 0.7, "books": 0.3}'
        ) from None
    names = pool.domain_names
    for name in names:
        if name not in weights:
            raise DataError(
                f"selection.doremi.weights: {path} has no weight for {name}, a domain of {pool.folder}: add it"
            )
    for name in weights:
        if name not in names:
            raise DataError(
                f"selection.doremi.weights: {path} has a weight for {name}, which is no domain of {pool.folder} "
                f"({', '.join(names)}): remove or rename it"
            )
    total = sum(weights.values())
    if total <= 0:
        raise DataError(f"selection.doremi.weights: all weights in {path} are 0: at least one domain must count")
    return {name: weights[name] / total for name in names}


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no weight")
    return float(value)
