"""What was measured of a finished run afterwards: results on tasks, and how far sets are contaminated."""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.analysis.runs import Run
from ray_dwm.data.records import read_json
from ray_dwm.errors import DataError

CONTAMINATION = "contamination.json"


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of one set is also in another."""

    name: str
    against: str
    overlap: float
    """Part of the set, 0 to 1."""
    threshold: float
    """From which on it counts as contaminated."""


def overlaps(run: Run) -> list[Overlap] | None:
    """What contamination.json says; None where nobody has looked.

    Raises:
        DataError: it is damaged.
    """
    path = run.folder / CONTAMINATION
    if not path.is_file():
        return None
    try:
        found = [(str(s["name"]), str(s["against"]), s["overlap"], s["threshold"]) for s in read_json(path)["sets"]]
        return [Overlap(name, against, float(part), float(most)) for name, against, part, most in found]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}): look for contamination again, or remove it") from None
