"""A quality filter: a linear classifier of hashed n-grams that tells the target set from the pool.

What GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix A) and DCLM (Li et al. 2024, arXiv 2406.11794) filter with.
Logistic regression instead of fastText's average of embeddings (Joulin et al. 2016, arXiv 1607.01759): of two classes
both are linear in a text's n-grams, and logistic regression has one optimum that no seed or learning rate moves.

Legend: n = rows, V = buckets, N = pairs of a row and a bucket that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dwm.config import to_dict
from ray_dwm.config.selection import ClassifierConfig, SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows
from ray_dwm.errors import DataError
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Arrays, RowFunction, Scored, Task
from ray_dwm.selection.ngrams import Ngrams, ngrams
from ray_dwm.selection.random import uniform
from ray_dwm.selection.told import Told

_HELD_OUT = 0.1
"""Part of the examples by which the classifier is judged."""
_EVALUATIONS = 300
_SAMPLING = 2**63
"""Added to the seed, which is smaller: examples are drawn independently of what selection=random draws."""


def prepare(task: Task) -> RowFunction:
    """Fit to all target sets, which count the same, against as many rows of the pool as `samples` says.

    Raises:
        DataError: the sampled texts have no words.
    """
    pool = _examples(task, "pool", task.pool)
    targets = [_examples(task, name, manifest) for name, manifest in task.targets.items()]
    parts = [pool, *targets]
    bags = Bags.joined([part.bags for part in parts])
    labels = np.repeat([0.0, *(1.0 for _ in targets)], [len(part.bags) for part in parts])
    held_out = np.concatenate([part.held_out for part in parts])
    learnt = [max(1, int((~part.held_out).sum())) for part in parts]
    shares = [0.5 / size for size in learnt[:1]] + [0.5 / len(targets) / size for size in learnt[1:]]
    weights = np.where(held_out, 0.0, np.repeat(shares, [len(part.bags) for part in parts]))
    classifier = fit(bags, labels, weights, task.options.classifier.buckets)
    scores = classifier.scores(bags)
    task.notes["examples"] = {"target": int(labels.sum()), "pool": int((1 - labels).sum())}
    task.notes["held_out"] = judged(scores[held_out], labels[held_out] == 1)
    if len(targets) > 1:  # a large set would hide a small one
        of = np.repeat(np.arange(len(parts)), [len(part.bags) for part in parts])
        task.notes["held_out_by_set"] = {
            name: judged(scores[held_out & among], of[held_out & among] == number)
            for number, name in enumerate(task.targets, start=1)
            for among in [(of == 0) | (of == number)]
        }
    return LogOdds(str(task.pool.folder), task.options.classifier, classifier)


def depends(options: SelectionConfig) -> dict[str, Any]:
    """All options but how rows are chosen."""
    return {key: value for key, value in to_dict(options.classifier).items() if key != "choice"}


def choose(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """The highest odds, or rows drawn in proportion to odds^(1 / temperature)."""
    choice = drawn if task.options.classifier.choice == "drawn" else highest
    return choice(task, scored, count)


@dataclass(frozen=True, slots=True)
class Bags:
    """Rows as bags of buckets, each of unit length (2-norm)."""

    buckets: NDArray[np.int64]
    """(N,)"""
    values: NDArray[np.float64]
    """(N,)"""
    sizes: NDArray[np.int64]
    """(n,) pairs of each row."""

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def of(found: Ngrams, rows: int, buckets: int) -> Bags:
        """Of so many rows, in `buckets` buckets."""
        pairs, counts = np.unique(found.rows_k * buckets + found.buckets_k, return_counts=True)
        owners, inside = np.divmod(pairs, buckets)
        lengths = np.sqrt(np.bincount(owners, weights=counts.astype(np.float64) ** 2, minlength=rows))
        return Bags(inside, counts / lengths[owners], np.bincount(owners, minlength=rows))

    @staticmethod
    def joined(parts: list[Bags]) -> Bags:
        """All rows of several."""
        return Bags(*(np.concatenate([getattr(part, name) for part in parts]) for name in Bags.__slots__))

    def dot(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inner product of every row with (V,), shape (n,)."""
        rows = np.repeat(np.arange(len(self)), self.sizes)
        summed = np.bincount(rows, weights=weights[self.buckets] * self.values, minlength=len(self))
        return summed.astype(np.float64, copy=False)

    def combine(self, factors: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
        """Sum of all rows times (n,) factors, shape (V,)."""
        summed = np.bincount(self.buckets, weights=np.repeat(factors, self.sizes) * self.values, minlength=buckets)
        return summed.astype(np.float64, copy=False)


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples from one set."""

    bags: Bags
    held_out: NDArray[np.bool_]


def _examples(task: Task, name: str, manifest: Manifest) -> _Part:
    o = task.options.classifier
    rate, folder = min(1.0, o.samples / manifest.rows), str(manifest.folder)
    blocks = list(task.sweep(f"n-grams of {name}", folder, Examples(folder, o, rate, task.seed + _SAMPLING)))
    bags = Bags.joined([Bags(block["buckets"], block["values"], block["sizes"]) for block in blocks])
    if not len(bags.buckets):
        raise DataError(f"{folder} has no words to learn from: choose another set, or features=tokens")
    return _Part(bags, np.concatenate([block["held_out"] for block in blocks]))


@dataclass(frozen=True, slots=True)
class Examples:
    """Bags of a part of the rows, of which a tenth is held out; which ones depends on seed and sample id alone."""

    folder: str
    options: ClassifierConfig
    rate: float
    seed: int

    def __call__(self, rows: Rows) -> Arrays:
        number = uniform(rows.sample_ids, self.seed)
        chosen = np.flatnonzero(number < self.rate)
        bags = _bags(rows[chosen], self.folder, self.options)
        held_out = number[chosen] < self.rate * _HELD_OUT
        return {"buckets": bags.buckets, "values": bags.values, "sizes": bags.sizes, "held_out": held_out}


@dataclass(frozen=True, slots=True)
class Classifier:
    """Log-odds of a row: bag . weights + bias."""

    weights: NDArray[np.float64]
    """(V,)"""
    bias: float

    def scores(self, bags: Bags) -> NDArray[np.float64]:
        """Log-odds of rows, (n,)."""
        return bags.dot(self.weights) + self.bias


def fit(bags: Bags, labels: NDArray[np.float64], weights: NDArray[np.float64], buckets: int) -> Classifier:
    """Logistic regression with the penalty |w|^2 / 2n, scikit-learn's default, by L-BFGS.

    Args:
        labels: (n,), 1 for the target.
        weights: (n,) of each row's loss, summing to 1; rows of weight 0 are not learnt from.
    """
    parameters = torch.zeros(buckets + 1, dtype=torch.float64)
    parameters.grad = torch.zeros_like(parameters)
    values, gradient = parameters.numpy(), parameters.grad.numpy()
    penalty = 1.0 / max(1, int((weights > 0).sum()))
    told = Told("fit of the classifier", _EVALUATIONS, unit="evaluations at most")

    def objective() -> float:
        w, bias = values[:-1], values[-1]
        logits = bags.dot(w) + bias
        losses = np.logaddexp(0.0, logits) - labels * logits
        slopes = weights * (np.exp(-np.logaddexp(0.0, -logits)) - labels)
        gradient[:-1] = bags.combine(slopes, buckets) + penalty * w
        gradient[-1] = slopes.sum()
        told.one()
        return float(weights @ losses + penalty / 2 * (w @ w))

    torch.optim.LBFGS(
        [parameters],
        max_iter=_EVALUATIONS,
        max_eval=_EVALUATIONS,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    ).step(objective)
    return Classifier(values[:-1].copy(), float(values[-1]))


def judged(scores: NDArray[np.float64], is_target: NDArray[np.bool_]) -> dict[str, float | int | None]:
    """AUC and balanced accuracy of log-odds; None where one of the classes is missing."""
    target, pool = scores[is_target], scores[~is_target]
    found: dict[str, float | int | None] = {"target": len(target), "pool": len(pool), "auc": None, "accuracy": None}
    if len(target) and len(pool):
        found["auc"] = auc(target, pool)
        found["accuracy"] = float(((target > 0).mean() + (pool <= 0).mean()) / 2)
    return found


def auc(target: NDArray[np.float64], pool: NDArray[np.float64]) -> float:
    """Chance that a row of the target scores higher than one of the pool, a tie counting half."""
    ordered = np.sort(pool)
    below, not_above = (np.searchsorted(ordered, target, side=side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(pool))


@dataclass(frozen=True, slots=True)
class LogOdds:
    """Log-odds of some rows to be of the target."""

    folder: str
    options: ClassifierConfig
    classifier: Classifier

    def __call__(self, rows: Rows) -> Arrays:
        return {"score": self.classifier.scores(_bags(rows, self.folder, self.options))}


def _bags(rows: Rows, folder: str, options: ClassifierConfig) -> Bags:
    found = ngrams(rows, folder, options.features, options.bigrams, options.buckets)
    return Bags.of(found, len(rows), options.buckets)
