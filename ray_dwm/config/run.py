"""The run configuration: frozen dataclasses, YAML files that hold only differences, dotted overrides.

`load(["configs/quickstart.yaml"], ["train.steps=200"])` is all that entry points need. Values are read as
text and converted by the declared type of their field, so a file and the command line mean the same
(`1e-4` is a number, `off` is a word), and an unknown key names its nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from ray_dwm.config.building import build, frozen, merge, nest, read, require
from ray_dwm.config.sections import (
    NAME,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    LmConfig,
    ParallelConfig,
    PrepareConfig,
    TrackingConfig,
    TrainConfig,
)
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.config.weighting import BilevelConfig, DwmConfig, WeightingConfig


@frozen
class RunConfig:
    """Everything that defines a run; stored in the run folder as config.yaml."""

    name: str = "run"
    storage: str = "runs"
    """Folder of run folders, visible from all nodes."""
    mirror: str = ""
    """Address, as s3://bucket/runs, of a folder to which the run folder is copied while it trains, and from which it
    comes back where it is gone; any that pyarrow or fsspec knows. Empty: none."""
    seed: int = 0
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    lm: LmConfig = field(default_factory=LmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    dwm: DwmConfig = field(default_factory=DwmConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name is {self.name!r}: use letters, digits, _ - and ., at most 128")
        require(bool(self.storage), "storage is empty: name a folder")
        require(
            "://" not in self.storage,
            f"storage is {self.storage!r}: runs are written to a folder, not to an address; mount it as a file system "
            "on all nodes, at the same path (docs/running.md says which kinds do), or have the folder copied there by "
            "mirror=...",
        )
        require(
            not self.mirror or "://" in self.mirror,
            f"mirror is {self.mirror!r}: it must be an address, as s3://bucket/runs or file:///backup/runs",
        )
        require(0 <= self.seed < 2**63, f"seed is {self.seed}: it must lie between 0 and 2^63 - 1")
        most, batch = self.cluster.most_workers, self.train.global_batch
        require(most <= batch, f"cluster.workers is {most}, train.global_batch {batch}: a worker needs a sequence")
        self._check_layout()
        require(
            not self.train.profile or self.train.profile_first < self.train.steps,
            f"train.profile_first is {self.train.profile_first}, but the run has {self.train.steps} steps: lower it",
        )
        every, takes = self.evaluation.every, self.evaluation.cpus + self.evaluation.gpus
        require(
            not (self.cluster.elastic and every and takes),
            "evaluation.cpus and evaluation.gpus must be 0 where cluster.workers is elastic, because Ray counts all of "
            "a node as the workers'",
        )
        require(
            every % self.checkpoint.every == 0,
            f"evaluation.every is {every}: checkpoints are evaluated, so it must be a multiple of checkpoint.every = "
            f"{self.checkpoint.every}",
        )
        if self.learns_dwm:
            self._check_fraction()
            self._check_estimator()
            self._check_target_batch()
            self._check_stages()
        if self.learns_dwm or self.in_stages:
            self._check_target_weights()

    def _check_layout(self) -> None:
        shard, most = self.parallel.shard, self.cluster.most_workers
        require(
            not (self.cluster.elastic and shard > 1),
            f"cluster.workers is elastic, and parallel.shard = {shard} does not divide every number of workers: set "
            "parallel.shard to 0 or 1, or cluster.workers to one number",
        )
        require(
            shard == 0 or most % shard == 0,
            f"parallel.shard is {shard}, which does not divide cluster.workers = {most}: use a divisor, or 0 for all "
            "workers",
        )
        require(
            not (self.parallel.cpu_offload and self.learns_dwm),
            "parallel.cpu_offload keeps the parameters away from where a DWM is learnt: set it to false and shard "
            "over more workers, or set weighting.method=uniform or dwm.mode=frozen",
        )

    def _check_target_weights(self) -> None:
        names = {"target", *self.data.more_targets}
        for name in self.bilevel.target_weights:
            require(
                name in names,
                f"bilevel.target_weights.{name}: there is no such target set, they are {', '.join(sorted(names))}",
            )
        weights = [self.bilevel.target_weights.get(name, 1.0) for name in names]
        require(sum(weights) > 0, "bilevel.target_weights are all 0: at least one target set must count")

    def _check_target_batch(self) -> None:
        sets = 1 + len(self.data.more_targets)
        require(
            self.bilevel.target_batch % sets == 0,
            f"bilevel.target_batch is {self.bilevel.target_batch}: with {sets} target sets use a multiple of {sets}",
        )

    def _check_stages(self) -> None:
        b = self.bilevel
        require(
            b.warmup_steps < self.train.steps,
            f"bilevel.warmup_steps is {b.warmup_steps}, train.steps {self.train.steps}: the DWM would never be learnt",
        )
        require(
            b.every > 0 or self.dwm.delay_steps <= 20,
            f"dwm.delay_steps is {self.dwm.delay_steps}: where bilevel.every is 0 it must be at most 20",
        )
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
        batch, fraction = self.train.global_batch, self.bilevel.fraction
        require(batch >= 2, f"train.global_batch is {batch}: a DWM weighs sequences against each other, use at least 2")
        divisors = [m for m in range(1, batch // 2 + 1) if batch % m == 0]
        require(
            any(abs(fraction * m - 1) < 1e-6 for m in divisors),
            f"bilevel.fraction is {fraction:g}: with train.global_batch = {batch} it must be one of "
            + ", ".join(f"{1 / m:.6g}" for m in divisors),
        )

    @property
    def learns_dwm(self) -> bool:
        """Whether the run has an upper level."""
        return self.weighting.method == "dwm" and self.dwm.learns

    @property
    def in_stages(self) -> bool:
        """Whether the run itself chooses its data, anew in every stage."""
        return self.data.selection == "mates"

    @property
    def selection_seed(self) -> int:
        """The seed of what is selected before the run."""
        return self.seed if self.selection.seed < 0 else self.selection.seed

    @property
    def target_draw(self) -> tuple[str, int] | None:
        """(key, sequences) of what the weighting draws from the target set at a time; None where it needs none."""
        draws = {
            "dwm": ("bilevel.target_batch", self.bilevel.target_batch),
            "joint_update_aware": ("weighting.anchor_sequences", self.weighting.anchor_sequences),
        }
        return None if not self.dwm.learns and self.weighting.method == "dwm" else draws.get(self.weighting.method)

    @property
    def weighting_label(self) -> str:
        """What gives the weights, for people."""
        if self.weighting.method != "dwm":
            return self.weighting.method
        kind = [word for word in (self.dwm.mode, self.dwm.control) if word not in ("learn", "none")]
        return f"DWM ({', '.join(kind)})" if kind else "DWM"

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
        merge(values, nest(key, text), "", "command line")
    return typing.cast(RunConfig, build(RunConfig, values))
