"""The section `selection` of the run configuration: how a part of the pool is chosen before training."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from ray_dwm.configuring import frozen, not_negative, positive, require

MethodName = Literal["none", "random", "dsir", "dsdm"]


@frozen
class DsirConfig:
    """Importance resampling by hashed n-grams (Xie et al. 2023, arXiv 2302.03169)."""

    features: Literal["text", "tokens"] = "text"
    """text: words and punctuation of the decoded text, as published. tokens: token ids, without decoding."""
    bigrams: bool = True
    """Count pairs of neighbours as well, as published."""
    buckets: int = 10_000
    """Into which n-grams are hashed."""

    def __post_init__(self) -> None:
        positive("selection.dsir", self, "buckets")


@frozen
class DsdmConfig:
    """Estimated effect on the target loss by projected gradients (Engstrom et al. 2024, arXiv 2401.12926)."""

    projection: Literal["factored", "dense"] = "factored"
    """Of gradients: both sides of every matrix's, or the whole as published, at many times the cost."""
    features: int = 4096
    """Numbers that a gradient is projected to: a square (factored), or a multiple of 64 (dense)."""
    damping: float = 1.0
    """What is added to the kernel's diagonal, over the mean of its eigenvalues but for those that must be 0."""
    kernel_rows: int = 65_536
    """Rows of the pool from which the kernel is estimated; a smaller pool is taken whole."""

    def __post_init__(self) -> None:
        positive("selection.dsdm", self, "features", "damping")
        require(self.kernel_rows >= 100, f"selection.dsdm.kernel_rows is {self.kernel_rows}: use at least 100")
        square = self.projection == "dense" or math.isqrt(self.features) ** 2 == self.features
        require(square, f"selection.dsdm.features is {self.features}: factored needs a square number, as 4096")
        words = self.projection == "factored" or self.features % 64 == 0
        require(words, f"selection.dsdm.features is {self.features}: dense needs a multiple of 64, as 4096")


@frozen
class ProxyConfig:
    """Small LMs through which some methods look at the data."""

    folders: tuple[str, ...] = ()
    """Run folders or Hugging Face folders; empty: plain LMs are trained on the pool, and kept in proxies/ of the
    storage for every selection from it."""
    count: int = 1
    """LMs to train, of seeds seed, seed + 1, ...; methods take the mean over them."""
    preset: str = "quickstart"
    """As lm.preset; all else is as in section `train`, but for:"""
    steps: int = 1000
    lr: float = 1e-3
    batch: int = 16
    """Sequences in one pass when a proxy looks at the data."""

    def __post_init__(self) -> None:
        positive("selection.proxy", self, "count", "steps", "lr", "batch")


@frozen
class SelectionConfig:
    """What is selected from data.train, the pool, for data.target; data.selection names the method."""

    budget: int = 0
    """Tokens to select."""
    output: str = ""
    """Folder of the selected shards; empty: in selections/ of the storage, named by what the selection depends on."""
    scores: str = ""
    """scores.parquet of an earlier selection from this pool, by the same method: nothing is scored again."""
    keep_scores: bool = False
    """Also write the scores of the whole pool, to scores.parquet in the output."""
    stratified: bool = False
    """Every domain keeps its part of the pool's tokens; the method chooses within domains."""
    temperature: float = 1.0
    """Of the Gumbel noise of methods that draw (dsir, mates); towards 0 they take the highest scores."""
    block_rows: int = 4096
    """Sequences in one unit of work: what an interrupted selection loses at most, for each task."""
    tasks: int = 2
    """Units of work that run at the same time."""
    cpus_per_task: float = 1.0
    gpus_per_task: float = 0.0
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    dsir: DsirConfig = field(default_factory=DsirConfig)
    dsdm: DsdmConfig = field(default_factory=DsdmConfig)

    def __post_init__(self) -> None:
        positive("selection", self, "temperature", "block_rows", "tasks", "cpus_per_task")
        not_negative("selection", self, "budget", "gpus_per_task")
