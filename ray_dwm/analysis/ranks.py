"""Rank correlations, and what they need: ranks with ties, means of groups taken out, the part that groups explain.

A weight is relative to its batch, so two weights are compared only where they are of the same batch: everything here
that looks at weights looks at one batch at a time, and returns one number for each.

Legend: n = values of a list, S = batches (recorded steps), r = sequences of a batch; X stands for any leading axes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.integer]

_NOTHING = 1e-9
"""Sums of squares of ranks below this are rounding: the list is constant."""


def ranks(values_Xn: NDArray[np.number]) -> Floats:
    """Ranks along the last axis, from 1; equal values share the mean of their ranks."""
    ranked = np.empty(values_Xn.shape)
    for values_n, into_n in zip(
        values_Xn.reshape(-1, values_Xn.shape[-1]), ranked.reshape(-1, values_Xn.shape[-1]), strict=True
    ):
        ordered_n = np.sort(values_n)
        below_n, upto_n = (np.searchsorted(ordered_n, values_n, side=side) for side in ("left", "right"))
        into_n[:] = (below_n + upto_n + 1) / 2
    return ranked


def correlation(a_Xn: Floats, b_Xn: Floats) -> Floats:
    """Pearson's correlation along the last axis; NaN where either is constant."""
    a_Xn = a_Xn - a_Xn.mean(axis=-1, keepdims=True)
    b_Xn = b_Xn - b_Xn.mean(axis=-1, keepdims=True)
    squares_X = (a_Xn**2).sum(axis=-1) * (b_Xn**2).sum(axis=-1)
    scale_X = np.sqrt(np.where(squares_X > _NOTHING, squares_X, np.nan))
    return np.asarray((a_Xn * b_Xn).sum(axis=-1) / scale_X)


def spearman(a_Xn: NDArray[np.number], b_Xn: NDArray[np.number]) -> Floats:
    """Spearman's rank correlation along the last axis: Pearson's of the ranks, which is right with ties too."""
    return correlation(ranks(a_Xn), ranks(b_Xn))


def without_means(values_Sr: Floats, groups_Sr: Codes) -> Floats:
    """Values less the mean of their group in their batch."""
    _, keys = np.unique(_keys(groups_Sr), return_inverse=True)
    keys = keys.ravel()
    means = np.bincount(keys, values_Sr.ravel()) / np.bincount(keys)
    return values_Sr - means[keys].reshape(values_Sr.shape)


def _keys(groups_Sr: Codes) -> NDArray[np.int64]:
    """A number for each group of each batch."""
    return np.arange(len(groups_Sr))[:, None] * (int(groups_Sr.max()) + 1) + groups_Sr


def within_batches(weights_Sr: Floats, values_Sr: NDArray[np.number], groups_Sr: Codes | None = None) -> Floats:
    """Spearman's correlation of weights with some values, batch by batch, (S,); NaN where either is constant.

    Args:
        groups_Sr: compare within groups: of both ranks the group's mean is taken out (a partial correlation).
    """
    a_Sr, b_Sr = ranks(weights_Sr), ranks(values_Sr)
    if groups_Sr is not None:
        a_Sr, b_Sr = without_means(a_Sr, groups_Sr), without_means(b_Sr, groups_Sr)
    return correlation(a_Sr, b_Sr)


def explained(weights_Sr: Floats, groups_Sr: Codes) -> Floats:
    """Part of the variance of a batch's ranks that lies between groups, (S,): epsilon squared.

    1 - (SS_within / (r - k)) / (SS_total / (r - 1)) with k groups in the batch: as eta squared, less what k groups of
    equals would explain by chance, so that its mean is 0 where weights do not depend on groups (Kelley 1935). NaN where
    the batch has one group, or none of two sequences, or equal weights.
    """
    ranks_Sr = ranks(weights_Sr)
    size = ranks_Sr.shape[1]
    groups_S = (np.diff(np.sort(groups_Sr, axis=1), axis=1) != 0).sum(axis=1) + 1
    total_S = ((ranks_Sr - ranks_Sr.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    within_S = (without_means(ranks_Sr, groups_Sr) ** 2).sum(axis=1)
    valid_S = (groups_S > 1) & (groups_S < size) & (total_S > _NOTHING)
    left_S = np.where(valid_S, size - groups_S, 1) * np.where(valid_S, total_S, 1.0)
    return np.where(valid_S, 1 - within_S * (size - 1) / left_S, np.nan)
