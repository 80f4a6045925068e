"""Tables as text, for pages and Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """One table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """Columns at the left that hold words, not numbers."""


def markdown(table: Table) -> str:
    """The table without its title."""
    rule = ("---",) * table.words + ("---:",) * (len(table.header) - table.words)
    lines = [table.header, rule, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
