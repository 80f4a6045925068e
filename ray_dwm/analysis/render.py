"""Pages from this package's templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, content: Mapping[str, Any]) -> str:
    """A whole page; text from outside is escaped, figures are not, and what a template misses is an error."""
    environment = Environment(
        loader=PackageLoader("ray_dwm.analysis", "."), autoescape=select_autoescape(), undefined=StrictUndefined
    )
    return environment.get_template(template).render(**content)
