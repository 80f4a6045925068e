"""What `ray-dwm plan` is told at the console: numbers within bounds, and a configuration on a number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable

from ray_dwm.errors import UserError


def number(name: str, otherwise: str, most: float = math.inf) -> Callable[[str], float]:
    """A parser of a finite number above 0.

    Args:
        name: of the option.
        otherwise: what leaving it out means.
        most: the largest that is allowed.

    Raises:
        UserError: by the parser, for anything else.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and 0 < value <= most):
            bound = f" and at most {most:g}" if math.isfinite(most) else ""
            raise UserError(f"{name} is {text}: it must be a number above 0{bound}; leave it out for {otherwise}")
        return value

    return parse


def whole(name: str, otherwise: str, least: int, most: int) -> Callable[[str], int]:
    """A parser of a whole number; see `number`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise UserError(
                f"{name} is {text}: it must be a whole number from {least} to {most}; leave it out for {otherwise}"
            )
        return value

    return parse
