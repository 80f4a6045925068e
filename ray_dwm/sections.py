"""The sections of the run configuration: what each field means, its default, and what it may be."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Literal

from ray_dwm.configuring import below_one, frozen, not_negative, positive, require
from ray_dwm.group_dro import GroupDroConfig
from ray_dwm.selecting import MethodName

NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


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
    selection: MethodName = "none"
    """Train on a part of data.train, chosen by this method; section `selection` has its budget and options."""
    order: Literal["auto", "shuffled", "stored"] = "auto"
    """Of the first epoch; later ones are shuffled. auto: stored where the shards' manifest says they are ordered."""
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
                    bool(NAME.fullmatch(name)) and name not in ("train", "target"),
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
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "eager"] = "auto"
    """The kernel of scaled_dot_product_attention; auto: the fastest that the device has; eager: none, step by step."""

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
    profile: bool = False
    """Write a trace of torch.profiler of profile_steps steps, from step profile_first on, to the run folder."""
    profile_first: int = 10
    profile_steps: int = 3

    def __post_init__(self) -> None:
        positive("train", self, "steps", "global_batch", "micro_batch", "lr", "eps", "eval_every", "eval_sequences")
        positive("train", self, "profile_steps")
        not_negative("train", self, "clip_norm", "weight_decay", "warmup_steps", "profile_first")
        below_one("train", self, "beta1", "beta2", "momentum")
        for name in ("min_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name} is {value}: it must lie between 0 and 1")


@frozen
class WeightingConfig:
    """What gives the sequences of a global batch their weights; the fields are those of the online baselines."""

    method: Literal["dwm", "uniform", "loss", "joint_update_aware", "group_dro"] = "dwm"
    """dwm: learnt (sections dwm and bilevel). uniform: plain training. loss: a function of the sequences' losses.
    joint_update_aware: likeness to the target set, less redundancy. group_dro: by domain, in a game against the LM.
    docs/baselines.md has formulas and sources."""
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
    group_dro: GroupDroConfig = field(default_factory=GroupDroConfig)

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
    trajectory_points: int = 50
    """Points of training, evenly spread, at which the applied version is written to the run folder's dwm/."""
    look_ahead: bool = False
    """Weigh the next batch beside the LM's step, on a GPU on a stream of its own; delay_steps must be at least 1."""
    min_ess_fraction: float = 0.05
    """The run stops where (ESS - 1) / (B - 1) falls below this: the weights have collapsed."""
    min_entropy: float = 0.8
    """A warning is printed where the weights' entropy over log B falls below this."""

    def __post_init__(self) -> None:
        positive("dwm", self, "lr", "temperature", "trajectory_points")
        not_negative("dwm", self, "clip_norm", "weight_decay", "delay_steps")
        below_one("dwm", self, "floor", "min_ess_fraction", "min_entropy")
        require(
            not (self.look_ahead and (self.delay_steps == 0 or self.lm_features or self.mode != "learn")),
            "dwm.look_ahead weighs a batch before the LM has seen it and the newest version is there: it needs "
            "dwm.delay_steps >= 1, dwm.lm_features=false and dwm.mode=learn",
        )
        require(
            self.mode == "learn" or self.control != "shuffled_target",
            f"dwm.control=shuffled_target is about learning, but dwm.mode={self.mode} does not learn",
        )
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
    target_batch: int = 8
    """Target sequences drawn afresh for each bi-level step, over all workers and target sets."""
    target_weights: dict[str, float] = field(default_factory=dict)
    """Name of a target set -> its weight in the target loss (1 where it is not named); they are normalised."""
    fraction: float = 1.0
    """Part of the training batch that is contracted: 1/m with m a divisor of train.global_batch."""
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
        require(
            self.fidelity_sequences >= 4,
            f"bilevel.fidelity_sequences is {self.fidelity_sequences}: a cosine after centring needs at least 4",
        )
        require(
            self.every > 0 or self.stages == 0,
            "bilevel.stages and bilevel.every=0 exclude each other: stages fix when the DWM is learnt, set every",
        )
        require(self.stage_lm == "update" or self.stages > 0, "bilevel.stage_lm=hold needs bilevel.stages")
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
class ParallelConfig:
    """How the LM is laid out over workers and memory; none of it changes what is computed, but for rounding."""

    shard: int = 0
    """Workers that share one copy of the LM (FSDP); a divisor of cluster.workers gives several copies (HSDP); 0: all"""
    reshard_after_forward: bool = True
    """Gather each block's parameters again for the backward, instead of holding them from the forward on."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward computes again: nothing; all but matrix products and attention; every block from its input."""
    compile: bool = False
    """torch.compile for every block and the loss."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer in the host's memory; not for a run that learns a DWM."""
    loss_chunk: int = 0
    """Tokens of a micro-batch whose logits are held at a time, and computed again in the backward; 0: all at once."""

    def __post_init__(self) -> None:
        not_negative("parallel", self, "shard", "loss_chunk")


@frozen
class ClusterConfig:
    """What the run asks of Ray."""

    workers: int | tuple[int, int] = 2
    """A number, or [least, most]: an elastic group, which Ray Train shrinks when a node is lost and grows when one
    comes. The global batch stays the same, and no number need divide it."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    dwm_cpus: float = 1.0
    dwm_gpus: float = 0.0
    max_failures: int = 3
    """Restarts of the worker group before the run gives up; -1 never does."""
    ingest_memory_mb: int = 512
    """Object store memory that one worker's ingest may hold."""

    def __post_init__(self) -> None:
        positive("cluster", self, "cpus_per_worker", "ingest_memory_mb")
        require(self.least_workers > 0, f"cluster.workers is {self.least_workers}: it must be greater than 0")
        require(
            self.least_workers <= self.most_workers,
            f"cluster.workers is [{self.least_workers}, {self.most_workers}]: the first number is the least of them",
        )
        not_negative("cluster", self, "gpus_per_worker", "dwm_cpus", "dwm_gpus")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            value = getattr(self, name)
            require(
                not self.elastic or value == int(value),
                f"cluster.{name} is {value}: where cluster.workers is elastic it must be a whole number, by which Ray "
                "counts how many workers a node holds",
            )
        require(
            not self.elastic or self.dwm_gpus == 0,
            f"cluster.dwm_gpus is {self.dwm_gpus}: it must be 0 where cluster.workers is elastic, because Ray counts "
            "all GPUs of a node as the workers'",
        )
        require(self.max_failures >= -1, f"cluster.max_failures is {self.max_failures}: it must be at least -1")

    @property
    def least_workers(self) -> int:
        """The fewest workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return self.least_workers < self.most_workers


@frozen
class CheckpointConfig:
    """DCP checkpoints of the whole training state."""

    every: int = 500
    keep: int = 2
    """The newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none."""
    asynchronous: bool = True
    """Write beside training, from a copy in the host's memory."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every", "keep")
        not_negative("checkpoint", self, "keep_every")


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
