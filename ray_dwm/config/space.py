"""The values that a key of a search space takes: an interval of numbers, or choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ray_dwm.config.building import build, frozen, require
from ray_dwm.errors import ConfigError

_KINDS = ("int", "float", "choice")


@frozen
class Domain:
    """The values of one key: an interval of numbers, or choices."""

    kind: Literal["int", "float", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Drawn evenly on a logarithmic scale."""
    step: float = 0.0
    """Between two values, from low on; 0: 1 for int, none for float."""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "choice":
            require(len(self.choices) > 1, f"choice is {list(self.choices)}: name at least two, or set the key instead")
            require(len(set(self.choices)) == len(self.choices), f"choice is {list(self.choices)}: it names one twice")
            require(not self.log and not self.step, "choice takes neither log nor step")
            return
        bounds = f"{self.kind}: [{self.low:g}, {self.high:g}]"
        require(self.low < self.high, f"{bounds} is empty: the first number is the least, the second the greatest")
        require(
            self.kind == "float" or (self.low == int(self.low) and self.high == int(self.high)),
            f"{bounds}: whole numbers are needed",
        )
        require(not self.log or self.low > 0, f"{bounds} with log: true: it must begin above 0")
        require(not (self.log and self.step), f"{bounds}: log and step exclude each other")
        require(0 <= self.step <= self.high - self.low, f"{bounds}: step is {self.step:g}, it must fit the range")
        require(self.kind == "float" or self.step == int(self.step), f"{bounds}: step is {self.step:g}, not whole")

    @property
    def ends(self) -> list[Any]:
        """What shows whether the configuration takes the whole domain: both bounds, or every choice."""
        return list(self.choices) if self.kind == "choice" else [self._number(self.low), self._number(self.high)]

    @property
    def points(self) -> list[Any]:
        """All values; none where there are infinitely many."""
        if self.kind == "choice":
            return list(self.choices)
        step = self.step or (1 if self.kind == "int" else 0)
        count = math.floor((self.high - self.low) / step + 1e-9) + 1 if step else 0
        return [self._number(self.low + k * step) for k in range(count)]

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if self.kind == "choice":
            return value in self.choices
        step = self.step or (1 if self.kind == "int" else 0)
        offset = (value - self.low) / step if step else 0.0
        return self.low <= value <= self.high and abs(offset - round(offset)) < 1e-9

    def read(self, text: str) -> Any:
        """A value as text, as what the domain holds.

        Raises:
            ValueError: it is no number, or not a whole one where these are needed.
        """
        return text if self.kind == "choice" else int(text) if self.kind == "int" else float(text)

    def _number(self, value: float) -> float | int:
        return int(value) if self.kind == "int" else float(value)


def by_key(space: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted key -> its domain as written, also where keys are given as sections."""
    found: dict[str, Any] = {}
    for key, value in space.items():
        inner = isinstance(value, Mapping) and not set(_KINDS) & value.keys() and value
        found |= by_key(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return found


def parse_domain(key: str, given: Any) -> dict[str, Any]:
    """A domain as written, `{int: [1, 50], log: true}`, as the fields of Domain.

    Raises:
        ConfigError: naming the key.
    """
    example = "as {int: [1, 50], log: true}, {float: [0.1, 1]} or {choice: [xs, s]}"
    require(isinstance(given, Mapping), f"space.{key} is {given!r}: name its values, {example}")
    kinds = [kind for kind in _KINDS if kind in given]
    unknown = sorted(given.keys() - {*_KINDS, "log", "step"})
    require(len(kinds) == 1 and not unknown, f"space.{key} is {dict(given)}: it must have one kind, {example}")
    values, kind = given[kinds[0]], kinds[0]
    values = values.strip("[] ").split(",") if isinstance(values, str) else values
    own = {name: given[name] for name in ("log", "step") if name in given}
    if kind == "choice":
        fields = {"kind": kind, "choices": [str(value).strip() for value in values], **own}
    else:
        require(isinstance(values, list) and len(values) == 2, f"space.{key}: {kind} takes two bounds, {example}")
        fields = {"kind": kind, "low": values[0], "high": values[1], **own}
    try:
        build(Domain, fields)
    except ConfigError as error:
        raise ConfigError(f"space.{key}: {error}") from None
    return fields


def described(domain: Domain) -> str:
    """A domain for people."""
    if domain.kind == "choice":
        return f"one of {', '.join(domain.choices)}"
    more = ", log" if domain.log else f", step {domain.step:g}" if domain.step else ""
    return f"{domain.kind} from {domain.low:g} to {domain.high:g}{more}"
