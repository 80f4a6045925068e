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
    held_out: dict[str, str] = field(default_factory=dict)
    """Name -> shards that are only ever evaluated."""
    block_rows: int = 32
    """Contiguous rows that are read together."""
    window_blocks: int = 1024
    """Blocks whose rows are shuffled among each other."""
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        positive("data", self, "block_rows", "window_blocks", "prefetch_batches")
        for name in self.held_out:
            require(
                bool(_NAME.fullmatch(name)) and name not in ("train", "target"),
                f"data.held_out has a set named {name!r}: use letters, digits, _ - . and neither train nor target",
            )


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

    def __post_init__(self) -> None:
        positive("dwm", self, "lr", "temperature")
        not_negative("dwm", self, "clip_norm", "weight_decay", "delay_steps")
        below_one("dwm", self, "floor", "min_ess_fraction")


@frozen
class BilevelConfig:
    """The upper level: when and how the hypergradient is estimated."""

    every: int = 10
    warmup_steps: int = 20
    estimator: Literal["central", "exact", "jvp"] = "central"
    target_batch: int = 32
    """Target sequences drawn afresh for each bi-level step, over all workers."""
    kl: float = 1.0
    """Pull to uniform weights, in units of the alignments' standard deviation."""
    updates: int = 2
    """Optimizer steps of the DWM per bi-level step."""
    scale_decay: float = 0.9
    """Memory of the running variance by which alignments are standardised."""
    epsilon: float = 0.0
    """Length |h u| of the central difference's perturbation; 0 means 1e-2 in fp32, 1e-1 in bf16 (it rounds more)."""

    def __post_init__(self) -> None:
        positive("bilevel", self, "every", "target_batch", "updates")
        not_negative("bilevel", self, "epsilon", "kl")
        below_one("bilevel", self, "scale_decay")
        require(
            self.warmup_steps >= 1,
            f"bilevel.warmup_steps is {self.warmup_steps}: it must be at least 1, at Adam's first step the "
            "hypergradient is noise",
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

    @property
    def target_draw(self) -> tuple[str, int] | None:
        """(key, sequences) of what the weighting draws from the target set at a time; None where it needs none."""
        draws = {
            "dwm": ("bilevel.target_batch", self.bilevel.target_batch),
            "joint_update_aware": ("weighting.anchor_sequences", self.weighting.anchor_sequences),
        }
        return draws.get(self.weighting.method)

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
