"""The section `selection` of the run configuration: how a part of the pool is chosen before training."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ray_dwm.configuring import frozen, not_negative, positive

MethodName = Literal["none", "random", "dsir"]


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
    block_tokens: int = 1_048_576
    """In one unit of work, which decides what a task holds in memory and what an interruption loses."""
    tasks: int = 2
    """Units of work that run at the same time."""
    cpus_per_task: float = 1.0
    gpus_per_task: float = 0.0
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    dsir: DsirConfig = field(default_factory=DsirConfig)

    def __post_init__(self) -> None:
        positive("selection", self, "temperature", "block_tokens", "tasks", "cpus_per_task")
        not_negative("selection", self, "budget", "gpus_per_task")
