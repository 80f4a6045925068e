"""The run configuration: frozen dataclasses, YAML files that hold only differences, dotted overrides.

`load(["configs/quickstart.yaml"], ["train.steps=200"])` is all that entry points need. Values are read as
text and converted by the declared type of their field, so a file and the command line mean the same
(`1e-4` is a number, `off` is a word), and an unknown key names its nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from ray_dwm.configuring import below_one, build, frozen, merge, not_negative, positive, read, require

_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@frozen
class PrepareConfig:
    """Text to token shards; used by `prepare`, and by `train` where the shards do not exist yet."""

    tokenizer: str = ""
    """A Hugging Face tokenizer folder."""
    train: str = ""
    """Files for data.train: a folder, a file or a glob of .jsonl, .jsonl.zst, .parquet or .txt."""
    target: str = ""
    more_targets: dict[str, str] = field(default_factory=dict)
    """Name of a further target set -> files."""
    held_out: dict[str, str] = field(default_factory=dict)
    """Name of a held-out set -> files."""
    seq_len: int = 2048
    domain_field: str = "domain"
    """The field that names a record's domain; where a record has none, its file's name does."""
    rows_per_file: int = 65536
    workers: int = 2
    """Parallel tokenisation tasks; the output does not depend on it."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"prepare.seq_len is {self.seq_len}: it must be at least 2")
        positive("prepare", self, "rows_per_file", "workers")


@frozen
class DataConfig:
    """Token shards (folders with a manifest.json) and the order in which they are read."""

    train: str = ""
    target: str = ""
    """What the upper level minimises."""
    more_targets: dict[str, str] = field(default_factory=dict)
    """Name -> shards of further target sets; bilevel.target_weights says how much each counts."""
    held_out: dict[str, str] = field(default_factory=dict)
    """Name -> shards that are only ever evaluated."""
    block_rows: int = 32
    """Contiguous rows that are read together."""
    window_blocks: int = 1024
    """Blocks whose rows are shuffled among each other."""
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        positive("data", self, "block_rows", "window_blocks", "prefetch_batches")
        for section, names in (("held_out", self.held_out), ("more_targets", self.more_targets)):
            for name in names:
                require(
                    bool(_NAME.fullmatch(name)) and name not in ("train", "target"),
                    f"data.{section} has a set named {name!r}: use letters, digits, _ - . and neither train nor target",
                )
        twice = sorted(self.held_out.keys() & self.more_targets.keys())
        require(not twice, f"data.held_out and data.more_targets both have a set named {', '.join(twice)}")
        require(bool(self.target) or not self.more_targets, "data.more_targets needs data.target, the first of them")


@frozen
class LmConfig:
    """The LM: a preset (see models/lm.py); 0 keeps the preset's or the data's value."""

    preset: str = "quickstart"
    seq_len: int = 0
    """Tokens of each training sequence that are used; 0 means the shards' sequence length."""
    attention: Literal["sdpa", "eager"] = "sdpa"

    def __post_init__(self) -> None:
        require(
            self.seq_len == 0 or self.seq_len >= 2,
            f"lm.seq_len is {self.seq_len}: it must be at least 2, or 0 for the shards'",
        )


@frozen
class TrainConfig:
    """The lower level: optimizer, schedule, batch and precision."""

    steps: int = 1000
    global_batch: int = 64
    """Sequences in one optimizer step, over all workers."""
    micro_batch: int = 32
    """Sequences in one forward pass of one worker."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Gradient clipping threshold; 0 switches clipping off."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: int = 100
    eval_sequences: int = 256
    """Sequences of each evaluation set used for the curves; summary.json has the loss over all."""

    def __post_init__(self) -> None:
        positive("train", self, "steps", "global_batch", "micro_batch", "lr", "eps", "eval_every", "eval_sequences")
        not_negative("train", self, "clip_norm", "weight_decay", "warmup_steps")
        below_one("train", self, "beta1", "beta2", "momentum")
        for name in ("min_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name} is {value}: it must lie between 0 and 1")


@frozen
class WeightingConfig:
    """What gives the sequences of a global batch their weights; the fields are those of the online baselines."""

    method: Literal["dwm", "uniform", "loss", "joint_update_aware"] = "dwm"
    """dwm: learnt (sections dwm and bilevel). uniform: plain training. loss: a function of the sequences' losses.
    joint_update_aware: likeness to the target set, less redundancy. docs/baselines.md has formulas and sources."""
    strategy: Literal["linupper", "quadratic", "extremes"] = "linupper"
    """Which losses `loss` prefers: all but the low ones, medium ones, or the lowest and highest."""
    r: float = 0.4
    """Temperature of `loss`: the largest weight is at most exp(1 / r) times the smallest."""
    r_warmup_steps: int = 0
    """LM steps with uniform weights before `loss` begins."""
    r_anneal_steps: int = 0
    """LM steps after the warm-up in which 1 / r grows linearly from 0; 0 switches at once."""
    beta: float = 0.1
    """Penalty of `joint_update_aware` on sequences that resemble one another."""
    tau: float = 0.05
    """Temperature of `joint_update_aware`, in units of a cosine."""
    anchor_every: int = 50
    """LM steps between two refreshes of the anchor of `joint_update_aware`."""
    anchor_sequences: int = 32
    """Target sequences whose mean embedding is the anchor, drawn afresh for each refresh, over all workers."""

    def __post_init__(self) -> None:
        positive("weighting", self, "r", "tau", "anchor_every", "anchor_sequences")
        not_negative("weighting", self, "r_warmup_steps", "r_anneal_steps", "beta")


@frozen
class DwmConfig:
    """The Data Weighting Model and its optimizer."""

    control: Literal["none", "random", "shuffled", "shuffled_target"] = "none"
    """Null controls: the DWM is learnt, but what is applied says nothing about the data. random: random weights as far
    from uniform (in KL) as the DWM's. shuffled: the DWM's weights dealt out at random within the batch.
    shuffled_target: the DWM's weights, learnt from alignments that were dealt out at random within the batch."""
    mode: Literal["learn", "frozen", "replay"] = "learn"
    """frozen: init_from as it is; replay: trajectory's versions, by fraction of training. Neither needs an actor."""
    init_from: str = ""
    """A DWM folder to start from."""
    trajectory: str = ""
    """The dwm folder of a run that learnt a DWM."""
    size: Literal["xs", "s", "m", "l"] = "xs"
    lm_features: bool = False
    """Also look at every sample's current LM loss and entropy (costs a forward where micro-batches accumulate)."""
    lr: float = 3e-3
    weight_decay: float = 0.01
    clip_norm: float = 0.1
    """Clipping threshold of the hypergradient dJ/dphi, which has no unit; 0 switches clipping off. Small on purpose:
    one batch of outliers must not undo what many taught."""
    temperature: float = 1.0
    floor: float = 0.0
    delay_steps: int = 1
    """LM steps between a bi-level step and the use of the DWM version it made."""
    min_ess_fraction: float = 0.05
    """The run stops where (ESS - 1) / (B - 1) falls below this: the weights have collapsed."""
    min_entropy: float = 0.8
    """A warning is printed where the weights' entropy over log B falls below this."""

    def __post_init__(self) -> None:
        positive("dwm", self, "lr", "temperature")
        not_negative("dwm", self, "clip_norm", "weight_decay", "delay_steps")
        below_one("dwm", self, "floor", "min_ess_fraction", "min_entropy")
        require(self.mode != "frozen" or bool(self.init_from), "dwm.mode=frozen needs dwm.init_from, a DWM folder")
        require(
            self.mode != "replay" or bool(self.trajectory), "dwm.mode=replay needs dwm.trajectory, a run's dwm folder"
        )


@frozen
class BilevelConfig:
    """The upper level: when and how the hypergradient is estimated."""

    every: int = 10
    """LM steps between two bi-level steps; 0 lets max_overhead choose it, and the target batch, from measured times."""
    max_overhead: float = 0.05
    """Where every is 0: time of what the DWM adds over time of plain training; target_batch is then the most."""
    warmup_steps: int = 20
    """LM steps before the first bi-level step."""
    stages: int = 0
    """Stages of equal length, at whose start the DWM is learnt and then stays, instead of every N steps; 0: none."""
    stage_updates: int = 10
    """Bi-level steps in a row at the start of each stage."""
    stage_lm: Literal["update", "hold"] = "update"
    """hold: while the DWM is learnt the LM is put back after every step; those batches do not train it."""
    estimator: Literal["ghost_lowrank", "one_sided", "central", "ghost", "jvp", "exact"] = "ghost_lowrank"
    """How the inner products are computed; docs/bilevel.md has measured costs and errors."""
    rank: int = 32
    """Rank of ghost_lowrank's sketches."""
    target_at: Literal["theta_prime", "theta"] = "theta_prime"
    """Where the target gradient is taken: after the LM's step, as defined, or before it, which ghost needs."""
    target_batch: int = 16
    """Target sequences drawn afresh for each bi-level step, over all workers and target sets."""
    target_weights: dict[str, float] = field(default_factory=dict)
    """Name of a target set -> its weight in the target loss (1 where it is not named); they are normalised."""
    fraction: float = 1.0
    """Part of the training batch that is contracted: 1/m with m a divisor of a worker's sequences."""
    reuse: int = 1
    """Bi-level steps that use one target gradient."""
    max_staleness: int = 50
    """LM steps after which a reused target gradient is computed anew."""
    kl: float = 1.0
    """Pull to uniform weights, in units of the alignments' standard deviation."""
    updates: int = 2
    """Optimizer steps of the DWM per bi-level step."""
    scale_decay: float = 0.9
    """Memory of the running variance by which alignments are standardised."""
    epsilon: float = 0.0
    """Length |h u| of a finite difference's perturbation; 0 means 1e-2 in fp32, 1e-1 in bf16 (it rounds more)."""
    fidelity_every: int = 20
    """Bi-level steps between two checks of the estimator against a better one; 0 switches them off."""
    fidelity_sequences: int = 16
    """Training sequences, over all workers, on which it is checked."""
    min_fidelity: float = 0.0
    """A warning is printed where the fidelity falls below this; 0 never warns."""

    def __post_init__(self) -> None:
        positive(
            "bilevel",
            self,
            "stage_updates",
            "max_overhead",
            "target_batch",
            "updates",
            "rank",
            "reuse",
            "max_staleness",
        )
        positive("bilevel", self, "fidelity_sequences")
        not_negative("bilevel", self, "every", "stages", "epsilon", "kl", "fidelity_every")
        below_one("bilevel", self, "scale_decay", "min_fidelity")
        for name, weight in self.target_weights.items():
            require(weight >= 0, f"bilevel.target_weights.{name} is {weight}: it must not be negative")
        require(
            self.warmup_steps >= 1,
            f"bilevel.warmup_steps is {self.warmup_steps}: it must be at least 1, at Adam's first step the "
            "hypergradient is noise",
        )
        require(
            self.estimator != "ghost" or self.target_at == "theta",
            "bilevel.estimator=ghost contracts inside the LM's backward, before theta' exists: set "
            "bilevel.target_at=theta, or use ghost_lowrank",
        )


@frozen
class ClusterConfig:
    """What the run asks of Ray."""

    workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    dwm_cpus: float = 1.0
    dwm_gpus: float = 0.0
    max_failures: int = 3
    """Restarts of the worker group before the run gives up; -1 never does."""
    ingest_memory_mb: int = 512
    """Object store memory that one worker's ingest may hold."""

    def __post_init__(self) -> None:
        positive("cluster", self, "workers", "cpus_per_worker", "ingest_memory_mb")
        not_negative("cluster", self, "gpus_per_worker", "dwm_cpus", "dwm_gpus")
        require(self.max_failures >= -1, f"cluster.max_failures is {self.max_failures}: it must be at least -1")


@frozen
class CheckpointConfig:
    """DCP checkpoints of the whole training state."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every", "keep")


@frozen
class TrackingConfig:
    """Where figures go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where WANDB_API_KEY is set, else offline; off never imports wandb."""
    project: str = "ray_dwm"
    group: str = ""
    weights_every: int = 1
    """Steps between two records of all weights in weights/*.parquet."""

    def __post_init__(self) -> None:
        positive("tracking", self, "weights_every")


@frozen
class RunConfig:
    """Everything that defines a run; stored in the run folder as config.yaml."""

    name: str = "run"
    storage: str = "runs"
    """Folder of run folders, visible from all nodes."""
    seed: int = 0
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lm: LmConfig = field(default_factory=LmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    dwm: DwmConfig = field(default_factory=DwmConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), f"name is {self.name!r}: use letters, digits, _ - and ., at most 128")
        require(bool(self.storage), "storage is empty: name a folder")
        require("://" not in self.storage, f"storage is {self.storage!r}: it must be a mounted folder, not an address")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}: it must lie between 0 and 2^63 - 1")
        self.local_batch("train.global_batch", self.train.global_batch)
        if self.target_draw is not None:
            self.local_batch(*self.target_draw)
        if self.learns_dwm:
            self._check_fraction()
            self._check_estimator()
            self._check_targets()
            self._check_stages()

    def local_batch(self, key: str, sequences: int) -> int:
        """Sequences per worker, split into whole micro-batches."""
        workers, micro = self.cluster.workers, self.train.micro_batch
        require(
            sequences % workers == 0,
            f"{key} is {sequences}, not divisible by cluster.workers = {workers}: use a multiple of {workers}",
        )
        local = sequences // workers
        require(
            local % min(micro, local) == 0,
            f"{key} = {sequences} gives {local} sequences per worker, not divisible by "
            f"train.micro_batch = {micro}: choose a divisor of {local}",
        )
        return local

    def _check_targets(self) -> None:
        names = {"target", *self.data.more_targets}
        for name in self.bilevel.target_weights:
            require(
                name in names,
                f"bilevel.target_weights.{name}: there is no such target set, they are {', '.join(sorted(names))}",
            )
        weights = [self.bilevel.target_weights.get(name, 1.0) for name in names]
        require(sum(weights) > 0, "bilevel.target_weights are all 0: at least one target set must count")
        parts = len(names) * self.cluster.workers
        require(
            self.bilevel.target_batch % parts == 0,
            f"bilevel.target_batch is {self.bilevel.target_batch}: with {len(names)} target sets and "
            f"{self.cluster.workers} workers use a multiple of {parts}",
        )

    def _check_stages(self) -> None:
        b = self.bilevel
        length = (self.train.steps - b.warmup_steps) // max(1, b.stages)
        require(
            b.stages == 0 or length >= b.stage_updates,
            f"bilevel.stages = {b.stages} leaves {length} steps a stage, too few for bilevel.stage_updates = "
            f"{b.stage_updates}: lower one of them or raise train.steps",
        )

    def _check_estimator(self) -> None:
        plain = self.train.optimizer == "sgd" and self.train.momentum == 0
        require(
            not (self.bilevel.estimator == "ghost_lowrank" and plain),
            "bilevel.estimator=ghost_lowrank takes its directions from the optimizer's momentum, and train.momentum is "
            "0: set bilevel.estimator to one_sided or central",
        )

    def _check_fraction(self) -> None:
        local, fraction = self.local_batch("train.global_batch", self.train.global_batch), self.bilevel.fraction
        divisors = [m for m in range(1, local + 1) if local % m == 0 and self.train.global_batch // m >= 2]
        fits = any(abs(fraction * m - 1) < 1e-6 for m in divisors)
        require(
            fits,
            f"bilevel.fraction is {fraction:g}: with {local} sequences per worker it must be one of "
            + ", ".join(f"{1 / m:.6g}" for m in divisors),
        )

    @property
    def learns_dwm(self) -> bool:
        """Whether the run has an upper level."""
        return self.weighting.method == "dwm" and self.dwm.mode == "learn"

    @property
    def target_draw(self) -> tuple[str, int] | None:
        """(key, sequences) of what the weighting draws from the target set at a time; None where it needs none."""
        draws = {
            "dwm": ("bilevel.target_batch", self.bilevel.target_batch),
            "joint_update_aware": ("weighting.anchor_sequences", self.weighting.anchor_sequences),
        }
        return None if self.dwm.mode != "learn" and self.weighting.method == "dwm" else draws.get(self.weighting.method)

    @property
    def weighting_label(self) -> str:
        """What gives the weights, for people."""
        if self.weighting.method != "dwm":
            return self.weighting.method
        return "DWM" if self.dwm.control == "none" else f"DWM ({self.dwm.control})"

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.storage).expanduser().absolute() / self.name


def to_dict(config: Any) -> dict[str, Any]:
    """The fully resolved configuration as plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The fully resolved configuration as YAML that `load` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then each YAML file, then each `dotted.key=value` override.

    Raises:
        ConfigError: naming the file or override, the key, and what would be valid.
    """
    values: dict[str, Any] = {}
    for file in files:
        merge(values, read(Path(file)), "", str(file))
    for override in overrides:
        key, separator, text = override.partition("=")
        require(bool(separator), f"override {override!r} is not of the form key=value")
        nested: Any = text
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        merge(values, nested, "", "command line")
    return typing.cast(RunConfig, build(RunConfig, values))
