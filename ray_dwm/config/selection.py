"""The section `selection` of the run configuration: how a part of the pool is chosen before training."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from ray_dwm.config.building import frozen, not_negative, positive, require

MethodName = Literal[
    "none", "random", "dsir", "dsdm", "classifier", "perplexity", "curriculum", "dwm", "doremi", "mates"
]
Features = Literal["text", "tokens"]


@frozen
class DsirConfig:
    """Importance resampling by hashed n-grams (Xie et al. 2023, arXiv 2302.03169)."""

    features: Features = "text"
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
class ClassifierConfig:
    """A linear classifier of hashed n-grams, the target sets against the pool."""

    features: Features = "text"
    """As of dsir."""
    bigrams: bool = True
    """Count pairs of neighbours as well."""
    buckets: int = 100_000
    """Into which n-grams are hashed."""
    samples: int = 10_000
    """Sequences of each set to learn from and to be judged by."""
    choice: Literal["highest", "drawn"] = "highest"
    """Take the highest scores, or draw by odds, with selection.temperature."""

    def __post_init__(self) -> None:
        positive("selection.classifier", self, "buckets")
        require(
            self.samples >= 100,
            f"selection.classifier.samples is {self.samples}: it must be at least 100, a tenth of them are held out",
        )


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
class DoremiConfig:
    """Domain weights by a reference LM and a proxy LM (Xie et al. 2023, arXiv 2305.10429). Section selection.proxy says
    how both are trained, weighting.group_dro how the weights are."""

    weights: str = ""
    """JSON file of domain weights, as domain_weights.json of an earlier selection: nothing is trained."""
    rounds: int = 1
    """At most so many, of which each trains its reference LM with the weights of the one before (iterated DoReMi)."""

    def __post_init__(self) -> None:
        positive("selection.doremi", self, "rounds")


@frozen
class PerplexityConfig:
    """A band of the pool's perplexities under a proxy LM, as CCNet has them (Wenzek et al. 2019, arXiv 1911.00359)."""

    low: float = 0.25
    """Quantile at which the band begins; 0: the lowest perplexity."""
    high: float = 0.75
    """Quantile at which it ends."""
    per_domain: bool = False
    """Every domain has a band of its own, of its own quantiles."""

    def __post_init__(self) -> None:
        require(
            0 <= self.low < self.high <= 1,
            f"selection.perplexity.low is {self.low:g}, high {self.high:g}: it must be 0 <= low < high <= 1",
        )


@frozen
class CurriculumConfig:
    """The order in which training reads a random part of the pool; selection/curriculum.py defines it."""

    criterion: Literal["length", "perplexity", "similarity", "dwm"] = "length"
    """What is easy: short documents; a low perplexity under the proxy LMs; likeness to the target sets, by dsir's
    ratio; a high score of the DWM in selection.dwm.folder."""
    order: Literal["easy_first", "hard_first", "shuffled"] = "easy_first"
    """hard_first and shuffled are the controls, of the same sequences."""
    pacing: Literal["linear", "root", "geometric", "stepwise"] = "root"
    """How what is available grows, from `start` to everything."""
    start: float = 0.1
    """Part of the sequences, the easiest, that is available at the beginning."""
    full: float = 0.5
    """Part of training after which all are available."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1, f"selection.curriculum.start is {self.start:g}: it must lie between 0 and 1")
        require(0 < self.full <= 1, f"selection.curriculum.full is {self.full:g}: it must lie in (0, 1]")
        require(
            self.pacing != "geometric" or self.start > 0,
            "selection.curriculum.start is 0, from which nothing grows geometrically: raise it, or use another pacing",
        )


@frozen
class DwmScoresConfig:
    """Scores of a DWM on data that it was not learnt on."""

    folder: str = ""
    """A DWM folder, as `export` makes and a run's dwm/v* are."""
    rounds: int = 8
    """Random batches in which each sequence is scored."""
    batch: int = 64
    """Sequences that are scored jointly; best the train.global_batch of the run that learnt the DWM."""
    choice: Literal["drawn", "highest"] = "drawn"
    """Draw sequences by weight, exp(score / selection.temperature), or take the highest scores."""

    def __post_init__(self) -> None:
        for name in ("rounds", "batch"):
            value = getattr(self, name)
            require(value >= 2, f"selection.dwm.{name} is {value}: it must be at least 2")


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
    seed: int = -1
    """Of all that selecting draws, and of its proxies; -1: the run's. One for runs of several seeds selects once for
    them all. Stages of a run by mates have the run's."""
    keep_scores: bool = False
    """Also write the scores of the whole pool, to scores.parquet in the output."""
    stratified: bool = False
    """Every domain keeps its part of the pool's tokens; the method chooses within domains."""
    temperature: float = 1.0
    """Of the Gumbel noise of methods that draw (dsir, mates, dwm and classifier with choice=drawn); towards 0 they take
    the highest scores."""
    block_tokens: int = 1_048_576
    """In one unit of work, which decides what a task holds in memory and what an interruption loses."""
    tasks: int = 2
    """Units of work that run at the same time."""
    cpus_per_task: float = 1.0
    gpus_per_task: float = 0.0
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    dsir: DsirConfig = field(default_factory=DsirConfig)
    dsdm: DsdmConfig = field(default_factory=DsdmConfig)
    doremi: DoremiConfig = field(default_factory=DoremiConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    dwm: DwmScoresConfig = field(default_factory=DwmScoresConfig)
    mates: MatesConfig = field(default_factory=MatesConfig)

    def __post_init__(self) -> None:
        positive("selection", self, "temperature", "block_tokens", "tasks", "cpus_per_task")
        not_negative("selection", self, "budget", "gpus_per_task")
        require(self.seed >= -1, f"selection.seed is {self.seed}: it must be -1, the run's, or more")
