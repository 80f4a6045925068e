"""JSON that runs leave behind, read back with one clear line where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_dwm.errors import DataError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        DataError: where it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and train again") from None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl; a last line that a crash cut is left out.

    Raises:
        DataError: where another line is damaged.
    """
    texts = path.read_text(errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            if number < len(texts):
                raise DataError(f"{path}: line {number} is damaged, restore or remove it") from None
    return lines
