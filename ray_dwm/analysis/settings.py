"""How runs were configured: what differs from the defaults, and in what they differ from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_dwm.analysis.tables import Table
from ray_dwm.config import RunConfig, to_dict
from ray_dwm.config.building import dotted
from ray_dwm.config.experiment import NEEDS

_PLACES = ("name", "storage", "seed", "tracking", "data.train", "data.target", *NEEDS)
"""Keys and sections that say where and which, not how."""
_PLACES_BY_NAME = ("data.held_out", "data.more_targets", "prepare.")


def changed(config: RunConfig, places: bool = True) -> dict[str, Any]:
    """Dotted keys whose values are not the defaults.

    Args:
        places: also those that say where and which, not how.
    """
    ours, defaults = dotted(to_dict(config)), dotted(to_dict(RunConfig()))
    found = {key: value for key, value in ours.items() if value != defaults.get(key)}
    return found if places else {key: value for key, value in found.items() if not _is_place(key)}


def _is_place(key: str) -> bool:
    return key.startswith(_PLACES_BY_NAME) or any(key == place or key.startswith(f"{place}.") for place in _PLACES)


def settings_table(configs: Mapping[str, RunConfig], places: bool = True) -> Table:
    """Keys that differ from the defaults in any of the configurations, by label; first those that are not alike."""
    values = {label: dotted(to_dict(config)) for label, config in configs.items()}
    defaults = dotted(to_dict(RunConfig()))
    keys = list(dict.fromkeys(key for config in configs.values() for key in changed(config, places)))
    keys.sort(key=lambda key: len({repr(of.get(key)) for of in values.values()}) == 1)
    rows = tuple((key, _text(defaults.get(key)), *(_text(of.get(key)) for of in values.values())) for key in keys)
    return Table("What differs from the defaults", ("key", "default", *configs), rows, 2 + len(configs))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
