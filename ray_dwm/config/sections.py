"""The sections of the run configuration: what each field means, its default, and what it may be."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Literal

from ray_dwm.config.building import below_one, frozen, not_negative, positive, require
from ray_dwm.config.selection import MethodName

MAX_OVERLAP = 0.01
"""Share of a task's items that may share words with the training set before it is refused."""
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
    """Name of a held-out set -> files; none leave the set out, as `prepare.held_out.NAME=` on a command line."""
    seq_len: int = 2048
    domain_field: str = "domain"
    """The field that names a record's domain; where a record has none, its file's name does."""
    rows_per_file: int = 65536
    workers: int = 2
    """Parallel tokenisation tasks; the output does not depend on it."""

    def __post_init__(self) -> None:
        _leave_out_empty(self)
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
        _leave_out_empty(self)
        positive("data", self, "block_rows", "window_blocks", "prefetch_batches")
        for section, names in (("held_out", self.held_out), ("more_targets", self.more_targets)):
            for name in names:
                require(
                    bool(NAME.fullmatch(name)) and name not in ("train", "target"),
                    f"data.{section} has a set named {name!r}: use letters, digits, _ - . and neither train nor target",
                )
        for key, folder in self._folders():
            require(
                "://" not in folder,
                f"data.{key} is {folder!r}: shards are read from a folder, not from an address; mount it as a file "
                "system on all nodes, at the same path",
            )
        twice = sorted(self.held_out.keys() & self.more_targets.keys())
        require(not twice, f"data.held_out and data.more_targets both have a set named {', '.join(twice)}")
        require(bool(self.target) or not self.more_targets, "data.more_targets needs data.target, the first of them")

    @property
    def target_sets(self) -> dict[str, str]:
        """Name -> shards of what the upper level minimises."""
        return {"target": self.target, **self.more_targets} if self.target else {}

    @property
    def evaluation_sets(self) -> dict[str, str]:
        """Name -> shards of everything that is evaluated: the target sets and the held-out sets."""
        return {**self.target_sets, **self.held_out}

    def _folders(self) -> list[tuple[str, str]]:
        more = [(f"more_targets.{name}", folder) for name, folder in self.more_targets.items()]
        held_out = [(f"held_out.{name}", folder) for name, folder in self.held_out.items()]
        return [("train", self.train), ("target", self.target), *more, *held_out]


def _leave_out_empty(sets: PrepareConfig | DataConfig) -> None:
    for name in ("more_targets", "held_out"):
        object.__setattr__(sets, name, {key: place for key, place in getattr(sets, name).items() if place})


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
    nodes_within_s: float = 0.0
    """Seconds in which nodes may still join a cluster that is too small; 0: the run is refused at once."""
    free_within_s: float = 3600.0
    """Seconds in which others must give back what the run needs."""

    def __post_init__(self) -> None:
        positive("cluster", self, "cpus_per_worker", "ingest_memory_mb", "free_within_s")
        require(self.least_workers > 0, f"cluster.workers is {self.least_workers}: it must be greater than 0")
        require(
            self.least_workers <= self.most_workers,
            f"cluster.workers is [{self.least_workers}, {self.most_workers}]: the first number is the least of them",
        )
        not_negative("cluster", self, "gpus_per_worker", "dwm_cpus", "dwm_gpus", "nodes_within_s")
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
    logs: Literal["auto", "text", "json"] = "auto"
    """What the run says: text for people, or JSON lines; auto: JSON in a Ray job and in the workers' own logs."""

    def __post_init__(self) -> None:
        positive("tracking", self, "weights_every")


@frozen
class EvaluationConfig:
    """Tasks by which a run is evaluated while it trains and at its end, beside the workers (docs/evaluation.md)."""

    tasks: tuple[str, ...] = ()
    """Task files, folders of them, and names of lm-eval's own tasks; none: no tasks."""
    every: int = 0
    """Steps, a multiple of checkpoint.every: those checkpoints are evaluated; 0: only the finished LM."""
    shots: tuple[int, ...] = (0,)
    """Examples in the context; every task is scored with each number."""
    batch: int = 32
    """Inputs in one forward pass."""
    max_overlap: float = MAX_OVERLAP
    """Share of a task's or target set's items that may share 13 words in a row with a set; above, it is refused."""
    cpus: float = 0.0
    """Logical CPUs of an evaluation; 0: one thread of low priority that nobody waits for."""
    gpus: float = 0.0

    def __post_init__(self) -> None:
        positive("evaluation", self, "batch")
        not_negative("evaluation", self, "every", "cpus", "gpus")
        require(
            bool(self.shots) and min(self.shots) >= 0,
            f"evaluation.shots is {self.shots}: name numbers from 0 on, as 0,2",
        )
        require(
            0 <= self.max_overlap <= 1,
            f"evaluation.max_overlap is {self.max_overlap}: it must lie between 0 and 1",
        )
        require(not self.every or bool(self.tasks), "evaluation.every needs evaluation.tasks: name task files")
