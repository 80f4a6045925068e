"""A model of influence: from a sequence's tokens to what a step on it does to the target loss, learnt from probes.

As in Yu et al. 2024 (arXiv 2406.06046), section 3.3, a regression of standardised oracle influences. There it is
BERT-base on decoded text; here a DWM without its attention over the batch, so that its scores are pointwise, which
reads the token ids themselves and costs about what a forward of a small LM costs.

Legend: n = rows, T = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_dwm.config.selection import MatesConfig
from ray_dwm.data.shards import Rows
from ray_dwm.engine.mesh import device
from ray_dwm.errors import DataError
from ray_dwm.models.dwm import DataWeightingModel, build_dwm, dwm_shape
from ray_dwm.selection.method import Arrays

LEAST_PROBES = 16
_BATCH = 32
_PATIENCE = 5
"""Passes without a gain after which learning ends."""
_LARGEST = 3.0
"""Standard deviations at which influences are cut to be learnt: few are far out, and would be most of the error."""
_QUARTILES = 1.349
"""Standard deviations between the quartiles of a normal distribution."""
_PARAMETER = "parameter."


@dataclass(frozen=True, slots=True)
class Fit:
    """Learns from the influences of all probes; of these, in one piece, its rows are."""

    influences: NDArray[np.float64]
    """(n,); NaN where there is none."""
    options: MatesConfig
    vocab_size: int
    seq_len: int
    """Tokens of each sequence that the LM sees."""
    seed: int

    def __call__(self, rows: Rows) -> Arrays:
        """Parameters, and `spearman` and `r2` on probes that were used for nothing else, `judged` of them.

        Raises:
            DataError: the influences say nothing.
        """
        known = np.isfinite(self.influences)
        values = self.influences[known]
        different = len(np.unique(values))
        if len(values) < LEAST_PROBES or different == 1:
            raise DataError(
                f"{len(values)} of {len(rows)} probes have an influence on the target loss, and {different} are "
                "different: there is nothing to learn, raise selection.mates.probes or use another target set"
            )
        ids = _tokens(rows, self.seq_len)[torch.from_numpy(known)]
        learnt, stopping, judging = _parts(len(values), self.seed)
        standard = standardised(values, learnt)
        model = _build(self.options.size, self.vocab_size, self.seed)
        epochs = _learn(model, ids, np.clip(standard, -_LARGEST, _LARGEST), learnt, stopping, self.options, self.seed)
        found = predict(model, ids[torch.from_numpy(judging)])
        expected = standard[judging]
        return {
            **{_PARAMETER + name: p.cpu().numpy() for name, p in model.state_dict().items()},
            "spearman": np.array(spearman(found, expected)),
            "r2": np.array(explained(found, expected)),
            "judged": np.array(len(judging)),
            "epochs": np.array(epochs),
        }


@dataclass(frozen=True, slots=True)
class Influence:
    """Predicted influence of some rows, in standard deviations of the probes' influences, see `standardised`."""

    size: str
    vocab_size: int
    seq_len: int
    parameters: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, fitted: Arrays, fit: Fit) -> Influence:
        """The model that `fit` has learnt."""
        parameters = {k.removeprefix(_PARAMETER): v for k, v in fitted.items() if k.startswith(_PARAMETER)}
        return cls(fit.options.size, fit.vocab_size, fit.seq_len, parameters)

    def __call__(self, rows: Rows) -> Arrays:
        model = _build(self.size, self.vocab_size, 0)
        model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in self.parameters.items()})
        return {"score": predict(model, _tokens(rows, self.seq_len))}


def standardised(values: NDArray[np.float64], by: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float64]:
    """Values in standard deviations from the centre, both by the quartiles of some: outliers do not move them.

    NaN stays NaN. Published: mean and standard deviation.
    """
    low, middle, high = np.nanquantile(values[by], (0.25, 0.5, 0.75))
    scale = (high - low) / _QUARTILES or float(np.nanstd(values[by])) or 1.0
    standard: NDArray[np.float64] = (values - middle) / scale
    return standard


def _build(size: str, vocab_size: int, seed: int) -> DataWeightingModel:
    """On this process's device."""
    return build_dwm(dwm_shape(size, vocab_size, batch_attention=False), seed).to(device())


def _tokens(rows: Rows, seq_len: int) -> Tensor:
    return torch.from_numpy(rows.input_ids[:, :seq_len].astype(np.int64))


def _parts(n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Probes to learn from, three quarters of them, to decide when to stop, and to judge what was learnt."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    eighth = n // 8
    return order[2 * eighth :], order[:eighth], order[eighth : 2 * eighth]


def _learn(
    model: DataWeightingModel,
    ids_nT: Tensor,
    targets_n: NDArray[np.float64],
    learnt: NDArray[np.int64],
    stopping: NDArray[np.int64],
    options: MatesConfig,
    seed: int,
) -> int:
    """Least squares by AdamW; the model is left as it was after the best pass, whose number is returned."""
    rng = np.random.Generator(np.random.Philox(seed + 1))
    place = next(model.parameters()).device
    targets = torch.from_numpy(targets_n).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    least, best, state = np.inf, 0, {}
    for epoch in range(1, options.epochs + 1):
        order = rng.permutation(learnt)
        for start in range(0, len(order), _BATCH):
            rows = torch.from_numpy(order[start : start + _BATCH])
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(ids_nT[rows].to(place)), targets[rows].to(place)).backward()
            optimizer.step()
        error = float(np.square(predict(model, ids_nT[torch.from_numpy(stopping)]) - targets_n[stopping]).mean())
        if not np.isfinite(error):
            raise DataError(f"the influence model diverges in pass {epoch}: lower selection.mates.lr")
        if error < least:
            least, best, state = error, epoch, {k: v.clone() for k, v in model.state_dict().items()}
        if epoch - best >= _PATIENCE:
            break
    model.load_state_dict(state)
    return best


@torch.no_grad()
def predict(model: DataWeightingModel, ids_nT: Tensor) -> NDArray[np.float64]:
    """Scores of sequences, each by itself, (n,)."""
    place = next(model.parameters()).device
    parts = [model(ids_bT.to(place)).double().cpu().numpy() for ids_bT in ids_nT.split(_BATCH)]
    return np.concatenate(parts)


def explained(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Part of the variance that is explained, R²; 0 where there is none."""
    around_mean = float(np.square(expected - expected.mean()).sum())
    return 1 - float(np.square(found - expected).sum()) / around_mean if around_mean else 0.0


def spearman(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    ranks = [_ranks(values) for values in (left, right)]
    if any(np.ptp(values) == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
