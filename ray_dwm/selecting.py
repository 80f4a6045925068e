"""The section `selection` of the run configuration: how a part of the pool is chosen before training."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ray_dwm.configuring import frozen, not_negative, positive, require

MethodName = Literal["none", "random", "dsir", "mates"]


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
class MatesConfig:
    """A model of each sequence's influence on the current LM, made anew in stages (Yu et al. 2024, arXiv 2406.06046).

    `train` with data.selection=mates runs the stages by itself; `select` makes the selection of one stage.
    """

    stages: int = 5
    """Of equal length; the first one trains on random sequences. Only of `train`."""
    candidates: Literal["part", "pool"] = "part"
    """What a stage chooses from. part: a random part of the pool, each stage another one, so that no sequence is chosen
    twice, as published. pool: all of it."""
    probes: int = 2048
    """Candidates on which the LM takes a step of its own, to see what that does to its loss on the target sets."""
    probe_targets: int = 64
    """Target sequences, of each set, on which that loss is taken; others in each stage."""
    size: Literal["xs", "s", "m", "l"] = "s"
    """Of the influence model, as dwm.size."""
    lr: float = 1e-3
    """Of the influence model."""
    epochs: int = 30
    """Passes over the probes at most; the best one, by probes that are held out, counts."""

    def __post_init__(self) -> None:
        positive("selection.mates", self, "stages", "probe_targets", "lr", "epochs")
        require(
            self.probes >= 16,
            f"selection.mates.probes is {self.probes}: it must be at least 16, a quarter of them are held out",
        )


@frozen
class SelectionConfig:
    """What is selected from data.train, the pool, for data.target; data.selection names the method."""

    budget: int = 0
    """Tokens to select; of a run by mates for each stage, and 0 means what the stage trains on."""
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
    mates: MatesConfig = field(default_factory=MatesConfig)

    def __post_init__(self) -> None:
        positive("selection", self, "temperature", "block_rows", "tasks", "cpus_per_task")
        not_negative("selection", self, "budget", "gpus_per_task")
