"""The Data Weighting Model: a whole batch of sequences in, one score per sequence out.

The paper (arXiv 2507.16178) leaves the architecture open; this one is ours and chosen to be cheap next to
the LM and to transfer between LMs:
- a sequence encoder of its own (token embedding, depthwise convolutions, attention pooling), linear in the
  sequence's length; nothing has the LM's width;
- beside it a bag of tokens, one learnt number per vocabulary entry: log-linear weights as DSIR has them (Xie et al.
  2023), but learnt by the hypergradient. It learns in fewer updates than the encoder;
- optional LM statistics (loss, entropy), standardised within the batch so that they have no LM's scale;
- self-attention over the batch without positions: scores are joint over the batch and permutation-equivariant;
- a score head and a bag that start at zero: version 0 weighs exactly uniformly.

Legend: B = sequences of the global batch, b = sequences of one rank, T = tokens, D = DWM width, S = statistics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS = ("loss", "entropy")
BAG_GAIN = 64.0
"""A score's change is this times the mean change of its tokens' numbers. Adam moves each by about the learning rate in
an update, so a token mean alone would follow far slower than the encoder's many parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DwmShape:
    """Architecture of a DWM; together with the tokenizer's hash this is its config.json."""

    vocab_size: int
    width: int
    layers: int
    batch_layers: int
    heads: int
    lm_features: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def features(self) -> list[str]:
        """What it looks at, in the order of its inputs: the feature spec of a DWM folder."""
        return ["token_ids", *(STATISTICS if self.lm_features else ())]


SIZES: dict[str, dict[str, int]] = {
    "xs": {"width": 32, "layers": 1, "batch_layers": 1, "heads": 4},
    "s": {"width": 64, "layers": 2, "batch_layers": 1, "heads": 4},
    "m": {"width": 128, "layers": 4, "batch_layers": 2, "heads": 4},
    "l": {"width": 256, "layers": 6, "batch_layers": 2, "heads": 8},
}


def dwm_shape(size: str, vocab_size: int, lm_features: bool = False, batch_attention: bool = True) -> DwmShape:
    """The shape of a size preset; without batch attention each sequence is scored by itself."""
    shape = DwmShape(vocab_size=vocab_size, lm_features=lm_features, **SIZES[size])
    return shape if batch_attention else replace(shape, batch_layers=0)


class _ConvBlock(nn.Module):
    """Pre-norm depthwise convolution over time and a pointwise MLP, both residual: (b, T, D) -> (b, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Conv1d(width, width, kernel_size=5, padding=2, groups=width)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_bTD: Tensor) -> Tensor:
        x_bTD = x_bTD + self.mix(self.norm(x_bTD).transpose(1, 2)).transpose(1, 2)
        return x_bTD + self.mlp(x_bTD)


class _BatchBlock(nn.Module):
    """Pre-norm self-attention over the batch and an MLP, both residual: (B, D) -> (B, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BD: Tensor) -> Tensor:
        h_1BD = self.norm(x_BD)[None]
        x_BD = x_BD + self.attention(h_1BD, h_1BD, h_1BD, need_weights=False)[0][0]
        return x_BD + self.mlp(x_BD)


class DataWeightingModel(nn.Module):
    """Encoder of single sequences plus a head over the whole batch.

    The two halves are separate methods because ranks encode their own sequences and all-gather the small
    embeddings before the head sees the global batch.
    """

    def __init__(self, shape: DwmShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.embedding = nn.Embedding(shape.vocab_size, width)
        self.encoder = nn.Sequential(*[_ConvBlock(width) for _ in range(shape.layers)])
        self.pool = nn.Linear(width, shape.heads)
        self.project = nn.Linear(2 * width, width)
        self.statistics = nn.Linear(len(STATISTICS), width, bias=False) if shape.lm_features else None
        self.head = nn.Sequential(*[_BatchBlock(width, shape.heads) for _ in range(shape.batch_layers)])
        self.norm = nn.RMSNorm(width)
        # No bias: softmax does not see a shift of all scores.
        self.score = nn.Linear(width, 1, bias=False)
        self.bag = nn.Embedding(shape.vocab_size, 1)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.bag.weight)
        nn.init.zeros_(self.score.weight)

    def encode(self, input_ids_bT: Tensor) -> Tensor:
        """What the batch head needs of single sequences, (b, T) token ids -> (b, D + 1).

        D columns of embedding (attention pooling next to the mean) and one with the bag's score.
        """
        x_bTD = self.encoder(self.embedding(input_ids_bT))
        heads = self.shape.heads
        attention_bTH = torch.softmax(self.pool(x_bTD), dim=1)
        x_bTHd = x_bTD.unflatten(-1, (heads, self.shape.width // heads))
        pooled_bD = (attention_bTH[..., None] * x_bTHd).sum(dim=1).flatten(1)
        embeddings_bD = self.project(torch.cat([pooled_bD, x_bTD.mean(dim=1)], dim=-1))
        return torch.cat([embeddings_bD, BAG_GAIN * self.bag(input_ids_bT).mean(dim=1)], dim=-1)

    def scores(self, encoded_BE: Tensor, statistics_BS: Tensor | None = None) -> Tensor:
        """Joint scores of the global batch, (B, D + 1) of `encode` -> (B,)."""
        embeddings_BD, bag_B = encoded_BE[:, :-1], encoded_BE[:, -1]
        if self.statistics is not None:
            assert statistics_BS is not None, "this DWM looks at LM statistics"
            centred_BS = statistics_BS - statistics_BS.mean(dim=0)
            scale_S = centred_BS.square().mean(dim=0).sqrt().clamp(min=1e-6)
            embeddings_BD = embeddings_BD + self.statistics(centred_BS / scale_S)
        return self.score(self.norm(self.head(embeddings_BD))).squeeze(-1) + bag_B

    def forward(self, input_ids_BT: Tensor, statistics_BS: Tensor | None = None) -> Tensor:
        return self.scores(self.encode(input_ids_BT), statistics_BS)


def build_dwm(shape: DwmShape, seed: int) -> DataWeightingModel:
    """A freshly initialised DWM; the same seed gives the same weights everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DataWeightingModel(shape)
