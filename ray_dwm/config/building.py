"""Tools of the configuration that know no section: checks of fields, YAML files, overrides, conversion by type."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ray_dwm.errors import ConfigError

frozen = dataclass(frozen=True, kw_only=True, slots=True)


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def positive(section: str, owner: Any, *names: str) -> None:
    """Require the named fields of a section to be greater than 0."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{section}.{name} is {value}: it must be greater than 0")


def not_negative(section: str, owner: Any, *names: str) -> None:
    """Require the named fields of a section to be at least 0."""
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{section}.{name} is {value}: it must not be negative")


def below_one(section: str, owner: Any, *names: str) -> None:
    """Require the named fields of a section to lie in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < 1, f"{section}.{name} is {value}: it must lie in [0, 1)")


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """A dataclass from nested text values, converted by the declared types."""
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown configuration key {path}{key}: did you mean {path}{_nearest(key, known)}?")
    return cls(**{key: _convert(value, known[key], f"{path}{key}") for key, value in values.items()})


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    """A known key: one that holds this key, whose section was left out, or else the one that looks most like it."""
    for name, kind in known.items():
        if dataclasses.is_dataclass(kind) and key in {field.name for field in dataclasses.fields(kind)}:
            return f"{name}.{key}"
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def read(file: Path) -> dict[str, Any]:
    """A YAML file's content, scalars as text."""
    try:
        # BaseLoader leaves scalars as text: the fields' types decide, not YAML's guesses.
        content = yaml.load(file.read_text(), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"configuration file {file} cannot be read: {reason}") from None
    if content in (None, ""):
        return {}
    require(isinstance(content, dict), f"configuration file {file} must hold a mapping of sections")
    return dict(content)


def merge(base: dict[str, Any], extra: Mapping[str, Any], path: str, source: str) -> None:
    """Put nested values over those of `base`, in place; `source` is whom an error names."""
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key, {}), dict):
            merge(base.setdefault(key, {}), value, f"{path}{key}.", source)
        else:
            require(
                isinstance(value, Mapping) or not isinstance(base.get(key), dict),
                f"{source}: {path}{key} is a section, not a value",
            )
            base[key] = value


def nest(key: str, value: Any) -> dict[str, Any]:
    """A dotted key's value as nested sections."""
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(value)


def _whole(text: str) -> int:
    """An integer, also one written as 1e9."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # not infinite either: that raises OverflowError
            raise ValueError from None
        return int(number)


def dotted(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _convert(value: Any, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{path} is a section, not the value {value!r}")
        return build(typing.cast(type, kind), value, f"{path}.")
    if origin is dict:
        require(isinstance(value, Mapping), f"{path} is {value!r}: it must be a mapping")
        of_values = typing.get_args(kind)[1]
        return {str(k): _convert(v, of_values, f"{path}.{k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        single, several = typing.get_args(kind)  # one value, or a tuple
        return _convert(value, several if isinstance(value, (list, tuple)) or "," in str(value) else single, path)
    if origin is tuple:
        parts = value if isinstance(value, (list, tuple)) else str(value).strip().strip("[]").split(",")
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:  # any number, also none
            return tuple(_convert(part, kinds[0], path) for part in parts if str(part).strip())
        require(len(parts) == len(kinds), f"{path} is {value}: it must be one value or {len(kinds)}, as in [1, 2]")
        return tuple(_convert(part, of, path) for part, of in zip(parts, kinds, strict=True))
    require(not isinstance(value, (Mapping, list)), f"{path} is {value!r}: it must be a single value")
    text = str(value).strip()
    if origin is Literal:
        choices = typing.get_args(kind)
        require(text in choices, f"{path} is {text!r}: it must be one of {', '.join(choices)}")
        return text
    if kind is bool:
        words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        require(text.lower() in words, f"{path} is {text!r}: it must be true or false")
        return words[text.lower()]
    try:
        number = _whole(text.replace("_", "")) if kind is int else kind(text)
    except ValueError:
        raise ConfigError(f"{path} is {text!r}: it must be of type {kind.__name__}") from None
    require(
        kind is not float or (number == number and abs(number) != float("inf")),
        f"{path} is {text!r}: not finite",
    )
    return number
