"""A declared sweep: a search space over the run's configuration, and the scales to which its winners are promoted.

A file says what all trials share (`config`, `set`), in what they differ (`space`, by the dotted keys of the command
line) and at which scales (`scales`: the search runs at the first); docs/tune.md has all of it. Nothing here starts
anything.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from ray_dwm.config.building import build, dotted, frozen, merge, nest, not_negative, positive, require
from ray_dwm.config.experiment import SizeConfig, declared
from ray_dwm.config.run import RunConfig, load, to_dict
from ray_dwm.config.sections import NAME
from ray_dwm.config.space import Domain, by_key, parse_domain
from ray_dwm.errors import ConfigError

CONTROLS = ("defaults", "uniform")
"""Trials that are always there, and first: the configuration as it is, and uniform weights."""
UNIFORM = {"weighting.method": "uniform"}
_FIXED = ("name", "storage", "seed", "data", "prepare", "lm", "checkpoint", "tracking", "cluster", "evaluation")
"""Sections that trials share: what is read, with which LM, and what is asked of the cluster."""
_FIXED_KEYS = ("train.steps", "train.global_batch", "train.eval_every", "train.eval_sequences")
LATER = "learnt by then"
"""Stands for a folder that is not there yet."""
_MOST_POINTS = 10_000
"""Of a grid."""


@frozen
class AshaConfig:
    """Ends trials early that do worse than others did after as many tokens (Li et al. 2020)."""

    grace_tokens: int = 0
    """Tokens that every trial gets; 0: none is ended early."""
    reduction: int = 3
    """One of so many goes on at each of the further points, which lie as many times further apart."""

    def __post_init__(self) -> None:
        not_negative("asha", self, "grace_tokens")
        require(self.reduction >= 2, f"asha.reduction is {self.reduction}: it must be at least 2")


@frozen
class TuneConfig:
    """Everything that defines a sweep; stored in its folder as tune.yaml."""

    name: str = ""
    storage: str = "runs"
    """Folder of the sweep's folder, visible from all nodes."""
    config: tuple[str, ...] = ()
    """Configuration files that all scales share."""
    set: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values, over these files."""
    scales: dict[str, SizeConfig] = field(default_factory=dict)
    """The search runs at the first, what is promoted at the others, one after another."""
    space: dict[str, Domain] = field(default_factory=dict)
    """Dotted key -> its values."""
    points: tuple[dict[str, str], ...] = ()
    """Trials that are known before, after the controls."""
    trials: int = 0
    """At the first scale, with controls and points; 0: all of a grid."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    startup: int = 8
    """Finished trials before `tpe` begins to learn from them; those before it are random."""
    seed: int = 0
    """Of the sampler."""
    study: str = ""
    """URL of the database in which Optuna keeps the study; empty: study.db in the sweep's folder, by SQLite."""
    measure: str = "target"
    """The evaluation set whose final loss is minimised."""
    objectives: tuple[Literal["loss", "overhead"], ...] = ("loss", "overhead")
    """What the sampler minimises; both at once: towards their Pareto front."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    concurrent: int = 0
    """Trials at once, at most; 0: as many as the cluster has room for."""
    retries: int = 1
    """Of a failed trial, before it is marked and the sweep goes on."""
    promote: int = 2
    """Trials that go to the next scale, besides the controls."""
    max_overhead: float = 0.0
    """Those whose overhead is above are not promoted; 0: any may be."""
    transfer: tuple[Literal["replay", "frozen", "adapt"], ...] = ("replay",)
    """What is tried there with the DWM that a promoted trial has learnt, beside learning anew."""
    seeds: tuple[int, ...] = (0,)
    """Of the runs; the search takes the first, what is promoted all of them."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values of the command line, over all else."""

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name is {self.name!r}: use letters, digits, _ - and ., at most 128")
        require(bool(self.scales), "scales is empty: name one at least, as scales: [quickstart, quickstart_4x]")
        for scale in self.scales:
            require(bool(NAME.fullmatch(scale)), f"scales.{scale}: use letters, digits, _ - and .")
        require(bool(self.space), "space is empty: name what is searched, as bilevel.every: {int: [1, 50], log: true}")
        require(bool(self.seeds), "seeds is empty: name at least one, as seeds: [0]")
        require(bool(self.objectives), "objectives is empty: name loss, overhead or both")
        require(len(set(self.objectives)) == len(self.objectives), "objectives names one twice")
        not_negative("tune", self, "trials", "seed", "concurrent", "retries", "promote", "max_overhead")
        positive("tune", self, "startup")
        self._check_number()
        for source in (self.set, self.overrides, *(scale.set for scale in self.scales.values())):
            for key in source:
                require(key not in ("name", "storage", "seed"), f"{key} cannot be set: it follows from the sweep")

    def _check_number(self) -> None:
        known = len(CONTROLS) + len(self.points)
        if self.sampler == "grid":
            for key, domain in self.space.items():
                require(bool(domain.points), f"space.{key} has no step: a grid needs one, or choice")
            size = math.prod(len(domain.points) for domain in self.space.values())
            require(
                size <= _MOST_POINTS, f"the grid has {size} points: use choice or a larger step, or another sampler"
            )
            return
        require(
            self.trials > known,
            f"trials is {self.trials}: with controls and points {known} are known before, name more than these",
        )

    @property
    def folder(self) -> Path:
        """Where trials, study and report lie."""
        return Path(self.storage).expanduser().absolute() / self.name

    @property
    def first(self) -> str:
        """The scale at which the search runs."""
        return next(iter(self.scales))

    @property
    def total(self) -> int:
        """Trials at the first scale."""
        if self.sampler != "grid":
            return self.trials
        size = math.prod(len(domain.points) for domain in self.space.values())
        most = len(CONTROLS) + len(self.points) + size
        return min(most, self.trials) or most


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A configuration with some values, by dotted keys, over its own.

    Raises:
        ConfigError: an unknown key, or an impossible value.
    """
    data = to_dict(config)
    for key, value in values.items():
        merge(data, nest(key, str(value)), "", "search space")
    return typing.cast(RunConfig, build(RunConfig, data))


def scale_config(config: TuneConfig, scale: str) -> RunConfig:
    """The run of a scale, as it is without any trial's values.

    Raises:
        ConfigError: naming the scale.
    """
    here = config.scales[scale]
    values = {"tracking.group": f"{config.name}/{scale}"} | config.set | here.set | config.overrides
    values |= {"seed": str(config.seeds[0]), "storage": str(config.folder), "name": scale}
    try:
        return load([*config.config, *here.config], [f"{key}={value}" for key, value in values.items()])
    except ConfigError as error:
        raise ConfigError(f"sweep {config.name}, scale {scale}: {error}") from None


def default_of(base: RunConfig, key: str, domain: Domain) -> Any:
    """What the configuration says itself, as a value of the domain; None where it does not lie in it."""
    value = dotted(to_dict(base))[key]
    if domain.kind != "choice":
        return value if domain.holds(value) else None
    same = [word for word in domain.choices if dotted(to_dict(with_values(base, {key: word})))[key] == value]
    return same[0] if same else None


def probes(config: TuneConfig, base: RunConfig) -> list[RunConfig]:
    """The configuration with each key at each end of its domain.

    Raises:
        ConfigError: a key is unknown, may not be searched, or does not take its domain's values.
    """
    found = []
    for key, domain in config.space.items():
        require(
            key not in _FIXED_KEYS and key.split(".")[0] not in _FIXED,
            f"space.{key} cannot be searched: trials that are compared read the same data, with the same LM, tokens "
            "and resources; set it, or make it a scale",
        )
        for value in domain.ends:
            try:
                found.append(with_values(base, {key: value}))
            except ConfigError as error:
                raise ConfigError(f"space.{key}: {error}") from None
        own = dotted(to_dict(found[-1]))[key]
        require(
            domain.kind != "float" or isinstance(own, float),
            f"space.{key} is float, but the key takes {type(own).__name__} values: use int or choice",
        )
    for number, point in enumerate(config.points, start=1):
        _check_point(config, f"points, number {number}", point)
        try:
            found.append(with_values(base, point))
        except ConfigError as error:
            raise ConfigError(f"points, number {number}: {error}") from None
    return found


def _check_scale(config: TuneConfig, scale: str, base: RunConfig) -> None:
    """Make sure that a scale takes the whole space and, where it is not the first, what is carried over to it."""
    try:
        probes(config, base)
        for how in config.transfer if scale != config.first else ():
            with_values(base, {"dwm.init_from": LATER, "dwm.trajectory": LATER, "dwm.mode": how})
    except ConfigError as error:
        raise error if scale == config.first else ConfigError(f"scale {scale}: {error}") from None


def _check_point(config: TuneConfig, place: str, point: Mapping[str, str]) -> None:
    for key in (*config.space, *point):
        require(
            key in config.space and key in point, f"{place}: it must name the keys of space, and {key} is not in both"
        )
        try:
            inside = config.space[key].holds(config.space[key].read(point[key]))
        except ValueError:
            inside = False
        require(inside, f"{place}: {key} = {point[key]} does not lie in its domain")


def load_tune(file: Path, overrides: Sequence[str] = ()) -> TuneConfig:
    """A sweep's file and `key=value` overrides: of the sweep's own keys, or of every run's.

    Raises:
        ConfigError: naming the file or override, the key, and what would be valid.
    """
    values = declared(file, overrides, TuneConfig)
    try:
        scales = values.get("scales")
        if isinstance(scales, (str, list)):  # names alone: of files in configs/
            names = scales.strip("[] ").split(",") if isinstance(scales, str) else scales
            values["scales"] = {n: {"config": f"configs/{n}.yaml"} for name in names if (n := str(name).strip())}
        space = values.get("space") or {}
        require(isinstance(space, Mapping), "space must be a mapping of dotted keys")
        values["space"] = {key: parse_domain(key, given) for key, given in by_key(space).items()}
        points = values.get("points") or []
        require(
            isinstance(points, list) and all(isinstance(point, Mapping) for point in points),
            "points must be a list of mappings of dotted keys to values",
        )
        values["points"] = [dotted(point) for point in points]
        config = typing.cast(TuneConfig, build(TuneConfig, values))
        bases = {scale: scale_config(config, scale) for scale in config.scales}
        require(
            not bases[config.first].cluster.elastic,
            "cluster.workers is elastic: such a run takes all CPUs of its nodes, which trials share; name one number",
        )
        for scale, base in bases.items():
            _check_scale(config, scale, base)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config


def values_of(config: TuneConfig) -> dict[str, Any]:
    """The sweep as plain values."""
    return dataclasses.asdict(config)
