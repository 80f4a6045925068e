"""Random projections that keep inner products (Johnson and Lindenstrauss 1984), made on the fly from a seed.

The signs are those of Achlioptas 2003 ("Database-friendly random projections"): +1 or -1 with equal odds. Each is a
bit of a hash of its place, so that any part of a matrix can be made alone, on any device, always the same.

Legend: n = gradients, P = parameters, k = features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 64
"""Signs that one hash gives; the number of features of a dense projection is a multiple."""
_BLOCK = 2**20
"""Signs that are there at a time."""
_GOLDEN, _MIXERS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def signs(seed: int, stream: int, first: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Rows first .. first + rows - 1 of an endless matrix of signs, (rows, columns), fp32.

    Args:
        seed, stream: together they name the matrix.
    """
    words = -(-columns // WORD)
    places = torch.arange(first * words, (first + rows) * words, device=device)
    hashed = _mix(places * _signed(_GOLDEN) + _signed(_key(seed, stream)))
    octets = hashed.view(torch.uint8).view(rows, words * 8)[:, : -(-columns // 8)]
    return F.embedding(octets.int(), _table(device)).flatten(1)[:, :columns]


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """The eight signs of every byte, (256, 8)."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2.0 * bits - 1.0).to(device)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014); torch's shifts of int64 bring in the sign, hence the masks."""
    for shift, factor in _MIXERS:
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _key(seed: int, stream: int) -> int:
    key = 0
    for part in (seed, stream):
        key = (key ^ part) + _GOLDEN & 2**64 - 1
        for shift, factor in _MIXERS:
            key = (key ^ key >> shift) * factor & 2**64 - 1
        key ^= key >> 31
    return key


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def project(gradients: Iterable[Tensor], k: int, seed: int, block: int = _BLOCK) -> Tensor:
    """Gradients times a matrix of P x k signs over sqrt(k), of which only a block is ever there.

    <project(x), project(y)> is <x, y> in expectation over seeds, with a variance of
    (|x|^2 |y|^2 + <x, y>^2 - 2 sum_p x_p^2 y_p^2) / k.

    Args:
        gradients: (n, ...) of one parameter after the other; the parameters' order is part of the projection.
        k: a multiple of WORD.

    Returns:
        (n, k), fp32.
    """
    assert k % WORD == 0
    first, found = 0, torch.empty(0)
    for gradient in gradients:
        for part_nb in gradient.float().flatten(1).split(max(1, block // k), dim=1):
            found = found if found.numel() else part_nb.new_zeros(len(part_nb), k)
            found.addmm_(part_nb, signs(seed, 0, first, part_nb.shape[1], k, part_nb.device))
            first += part_nb.shape[1]
    return found / math.sqrt(k)


def factors(seed: int, index: int, shape: torch.Size, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two sides of a factored projection of a matrix, (O, rank) and (I, rank).

    <L^T X R, L^T Y R> is <X, Y> in expectation over seeds.

    Args:
        index: the matrix's number within the LM.
        shape: (O, I).
    """
    scale = 1 / math.sqrt(rank)
    left, right = (signs(seed, 1 + 2 * index + side, 0, shape[side], rank, device) * scale for side in (0, 1))
    return left, right
