"""The section `selection` of the run configuration: how a part of the pool is chosen before training."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ray_dwm.configuring import frozen, not_negative, positive, require

MethodName = Literal["none", "random", "dsir", "classifier", "perplexity", "curriculum", "dwm"]
Features = Literal["text", "tokens"]


@frozen
class DsirConfig:
    """Importance resampling by hashed n-grams (Xie et al. 2023, arXiv 2302.03169)."""

    features: Features = "text"
    """text: words and punctuation of the decoded text, as published. tokens: token ids, without decoding."""
    ngrams: int = 2
    """1: words alone; 2: pairs of neighbours as well, as published."""
    buckets: int = 10_000
    """Into which n-grams are hashed."""

    def __post_init__(self) -> None:
        _few_ngrams("selection.dsir", self.ngrams)
        positive("selection.dsir", self, "buckets")


@frozen
class ClassifierConfig:
    """A linear classifier of hashed n-grams, the target sets against the pool."""

    features: Features = "text"
    """As of dsir."""
    ngrams: int = 2
    """1: words alone; 2: pairs of neighbours as well."""
    buckets: int = 100_000
    """Into which n-grams are hashed."""
    samples: int = 20_000
    """Sequences of each set to learn from and to be judged by."""
    choice: Literal["highest", "drawn"] = "highest"
    """Take the highest scores, or draw by odds, with selection.temperature."""

    def __post_init__(self) -> None:
        _few_ngrams("selection.classifier", self.ngrams)
        positive("selection.classifier", self, "buckets")
        require(
            self.samples >= 100,
            f"selection.classifier.samples is {self.samples}: it must be at least 100, a tenth of them are held out",
        )


def _few_ngrams(section: str, ngrams: int) -> None:
    require(1 <= ngrams <= 4, f"{section}.ngrams is {ngrams}: it must lie between 1 and 4")


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
    dsir: DsirConfig = field(default_factory=DsirConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        positive("selection", self, "temperature", "block_rows", "tasks", "cpus_per_task")
        not_negative("selection", self, "budget", "gpus_per_task")
