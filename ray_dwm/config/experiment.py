"""A declared experiment: methods x seeds x sizes over one base configuration. Every cell of the grid is a run.

A file says what the cells share (`config`, `set`) and in what they differ (`sizes`, `methods`); docs/experiments.md has
all of it. Nothing here starts anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_dwm.config.building import build, dotted, frozen, merge, nest, read, require
from ray_dwm.config.run import RunConfig, load
from ray_dwm.config.sections import NAME
from ray_dwm.errors import ConfigError

NEEDS = {
    "dwm.trajectory": "dwm",
    "dwm.init_from": "newest DWM",
    "selection.dwm.folder": "newest DWM",
    "selection.proxy.folders": "run",
    "weighting.group_dro.reference": "run",
}
"""Keys that may take what another cell of the same seed has left, to which part of its run folder that is."""
RESERVED = ("cells", "selections", "proxies")
"""Folders of an experiment beside those of its sizes."""
_CONTROLS = {"shuffled": "shuffled weights", "random": "random weights"}
_OWN = ("name", "storage", "seed")
"""What the experiment itself says of every run."""


@frozen
class SizeConfig:
    """One size of the LM, or another setting under which all methods are compared with one another."""

    config: tuple[str, ...] = ()
    """Configuration files, over those of the experiment."""
    set: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values."""


@frozen
class MethodConfig:
    """One way to train."""

    label: str = ""
    """For people; empty: its name."""
    set: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values."""
    needs: dict[str, str] = field(default_factory=dict)
    """Dotted keys that take what another method of the same seed has left -> that method, or size/method."""
    against: tuple[str, ...] = ()
    """Methods, besides the baseline, with which this one is compared: the first is this one's `alone`."""
    sizes: tuple[str, ...] = ()
    """Those in which it takes part; empty: all."""

    @property
    def is_null(self) -> bool:
        """Whether its weights say nothing about the data."""
        return self.set.get("dwm.control", "none") != "none"


@frozen
class ExperimentConfig:
    """Everything that defines an experiment; stored in its folder as experiment.yaml."""

    name: str = ""
    storage: str = "runs"
    """Folder of the experiment's folder, visible from all nodes."""
    config: tuple[str, ...] = ()
    """Configuration files that all cells share."""
    set: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values, over these files."""
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    """Empty: one, named by lm.preset."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""
    """The method with which all others are compared."""
    measure: str = "target"
    """The evaluation set whose loss decides; the others are listed."""
    repeat: str = ""
    """A method whose cells of the first seed are run twice, to see whether the two are identical; empty: none."""
    analyze: tuple[str, ...] = ()
    """Methods of whose runs it is measured, when all cells are done, what their weights preferred."""
    nulls: bool = True
    """Add the null controls where the file does not have them."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Dotted keys -> values of the command line, over all else."""

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name is {self.name!r}: use letters, digits, _ - and ., at most 128")
        for kind, names in (("sizes", self.sizes), ("methods", self.methods)):
            for name in names:
                require(
                    bool(NAME.fullmatch(name)) and name not in RESERVED,
                    f"{kind}.{name}: use letters, digits, _ - and ., and none of {', '.join(RESERVED)}",
                )
        require(bool(self.methods), "methods is empty: name at least one method")
        require(bool(self.seeds), "seeds is empty: name at least one, as seeds: [0, 1, 2]")
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        require(not twice, f"seeds names {', '.join(map(str, twice))} twice")
        require(all(0 <= seed < 2**63 for seed in self.seeds), f"seeds are {self.seeds}: none may be negative")
        self._check_names()
        for source in (self, *self.sizes.values(), *self.methods.values()):
            for key in source.set:
                require(key not in _OWN, f"{key} cannot be set: it follows from the experiment (name, storage, seeds)")

    def _check_names(self) -> None:
        self._known("baseline", self.baseline, self.methods)
        for key, names in (("repeat", [self.repeat] if self.repeat else []), ("analyze", self.analyze)):
            for name in names:
                self._known(key, name, self.methods)
        labels = [self.label(name) for name in self.methods]
        same = sorted({label for label in labels if labels.count(label) > 1})
        require(not same, f"methods: {', '.join(same)} is the label of more than one: give each its own")
        to_come = [f"null-{control}" for control in _CONTROLS] if self.nulls else []
        for name, method in self.methods.items():
            for other in method.against:
                self._known(f"methods.{name}.against", other, [*self.methods, *to_come])
                require(other != name, f"methods.{name}.against names the method itself")
            for size in method.sizes:
                self._known(f"methods.{name}.sizes", size, self.sizes)
            for key, place in method.needs.items():
                self._known(f"methods.{name}.needs", key, NEEDS)
                self._known(f"methods.{name}.needs.{key}", place.rpartition("/")[2], self.methods)
                if "/" in place:
                    self._known(f"methods.{name}.needs.{key}", place.rpartition("/")[0], self.sizes)

    @staticmethod
    def _known(key: str, name: str, names: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
        hint = f": did you mean {near[0]}?" if near else ""
        require(name in names, f"{key} is {name!r}, and there is none of that name{hint}")

    @property
    def folder(self) -> Path:
        """Where cells, their records and the leaderboard lie."""
        return Path(self.storage).expanduser().absolute() / self.name

    def label(self, method: str) -> str:
        """A method's name for people."""
        return self.methods[method].label or method


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    size: str
    method: str
    seed: int
    again: bool = False
    """The second run of the same, which must come out identical."""

    @property
    def path(self) -> str:
        """Its run folder, within the experiment's; also its name for people."""
        return f"{self.size}/{self.method}/seed-{self.seed}{'-again' if self.again else ''}"


def grid(experiment: ExperimentConfig) -> list[Cell]:
    """All cells: seed by seed and, within a seed, what others need before these.

    Raises:
        ConfigError: cells need one another in a circle, or one that is not in the grid.
    """
    cells: dict[Cell, None] = {}  # an ordered set
    for seed in experiment.seeds:
        for size in experiment.sizes:
            for name, method in experiment.methods.items():
                if not method.sizes or size in method.sizes:
                    _add(experiment, Cell(size, name, seed), cells, ())
    first = experiment.seeds[0]
    cells |= {
        Cell(c.size, c.method, c.seed, True): None for c in cells if (c.method, c.seed) == (experiment.repeat, first)
    }
    for size in dict.fromkeys(cell.size for cell in cells):
        baseline = Cell(size, experiment.baseline, first)
        require(baseline in cells, f"baseline {experiment.baseline} is not in size {size}, where others are: add it")
    return list(cells)


def _add(experiment: ExperimentConfig, cell: Cell, cells: dict[Cell, None], above: tuple[Cell, ...]) -> None:
    require(cell not in above, f"methods.{cell.method}.needs: it would need itself, in a circle")
    sizes = experiment.methods[cell.method].sizes
    require(
        not sizes or cell.size in sizes,
        f"methods.{above[-1].method if above else cell.method}.needs {cell.size}/{cell.method}, which is not in the "
        f"grid: add {cell.size} to methods.{cell.method}.sizes, or name another as size/method",
    )
    for other in needed(experiment, cell).values():
        _add(experiment, other, cells, (*above, cell))
    cells[cell] = None


def needed(experiment: ExperimentConfig, cell: Cell) -> dict[str, Cell]:
    """Dotted key -> the cell from which it takes something."""
    found = {}
    for key, place in experiment.methods[cell.method].needs.items():
        size, _, method = place.rpartition("/")
        found[key] = Cell(size or cell.size, method, cell.seed)
    return found


def run_config(experiment: ExperimentConfig, cell: Cell, given: Mapping[str, str]) -> RunConfig:
    """The run of a cell. Its storage is the experiment's folder, where selections and proxies are shared.

    Args:
        given: dotted key -> path of what other cells have left.

    Raises:
        ConfigError: naming the cell.
    """
    size, method = experiment.sizes[cell.size], experiment.methods[cell.method]
    values = {"tracking.group": f"{experiment.name}/{cell.size}/{cell.method}"}
    values |= experiment.set | size.set | method.set | experiment.overrides | given
    values |= {"seed": str(cell.seed), "storage": str(experiment.folder), "name": Path(cell.path).name}
    try:
        return load([*experiment.config, *size.config], [f"{key}={value}" for key, value in values.items()])
    except ConfigError as error:
        raise ConfigError(f"experiment {experiment.name}, {cell.path}: {error}") from None


def load_experiment(file: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """An experiment's file and `key=value` overrides: of the experiment's own keys, or of every run's.

    The null controls are added where the file does not have them.

    Raises:
        ConfigError: naming the file or override, the key, and what would be valid.
    """
    values = declared(file, overrides, ExperimentConfig)
    try:
        own = values.get("overrides", {})
        require("seed" not in own, "seed cannot be set: an experiment has seeds, as seeds=0,1,2")
        experiment = typing.cast(ExperimentConfig, build(ExperimentConfig, values))
        if not experiment.sizes:
            settings = {**experiment.set, **experiment.overrides}
            preset = load(experiment.config, [f"{key}={value}" for key, value in settings.items()]).lm.preset
            experiment = dataclasses.replace(experiment, sizes={preset: SizeConfig()})
        if experiment.nulls:
            experiment = _with_controls(experiment)
        grid(experiment)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return experiment


def declared(file: Path, overrides: Sequence[str], kind: type) -> dict[str, Any]:
    """A file's values, with `key=value` over them: fields of `kind` its own, all others every run's (`overrides`).

    Raises:
        ConfigError: naming the file or override.
    """
    values = read(file)
    own = {f.name for f in dataclasses.fields(kind)} - {"overrides"}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        require(bool(separator), f"override {override!r} is not of the form key=value")
        nested = nest(key, text) if key.split(".")[0] in own else {"overrides": {key: text}}
        merge(values, nested, "", "command line")
    return _flattened(values)


def _with_controls(experiment: ExperimentConfig) -> ExperimentConfig:
    """With the null controls, on the baseline's data: a DWM learns as ever, its weights say nothing."""
    there = {method.set.get("dwm.control") for method in experiment.methods.values()}
    baseline, added = experiment.methods[experiment.baseline], {}
    for control, label in _CONTROLS.items():
        if control not in there:
            weights = {"weighting.method": "dwm", "dwm.mode": "learn", "dwm.control": control}
            added[f"null-{control}"] = MethodConfig(label=label, set=baseline.set | weights, sizes=baseline.sizes)
    return dataclasses.replace(experiment, methods=experiment.methods | added)


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """With nested sections under `set` and `needs` as dotted keys."""
    result = dict(values)
    for key, value in values.items():
        if key in ("set", "needs", "overrides") and isinstance(value, Mapping):
            result[key] = {name: _text(part) for name, part in dotted(value).items()}
        elif key in ("sizes", "methods", "scales") and isinstance(value, Mapping):
            result[key] = {
                name: _flattened(part) if isinstance(part, dict) else part or {} for name, part in value.items()
            }
    return result


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
