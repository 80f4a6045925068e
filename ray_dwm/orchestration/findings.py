"""What a check found, the limits that every check runs under, and how findings are shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_dwm.errors import DwmError

State = Literal["ok", "warning", "failed", "skipped"]
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was looked at, how it is, what was found, and what to do about it."""

    check: str
    state: State
    found: str
    """For a skipped check: why it was skipped."""
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def attempt(name: str, check: Check) -> list[Finding]:
    """A check's rows. Whatever it raises is a failed row."""
    try:
        return list(check())
    except Exception as error:
        return [failure(name, error)]


def run_check(name: str, check: Check, limit_s: float) -> list[Finding]:
    """See `attempt`; silence for `limit_s` seconds is a failed row too.

    A check that is cut off may go on in its thread, which does not keep the process alive.
    """
    findings: list[Finding] = []
    thread = threading.Thread(target=lambda: findings.extend(attempt(name, check)), daemon=True)
    thread.start()
    thread.join(limit_s)
    if not thread.is_alive():
        return findings
    remedy = "look for a node, a mount or a network address that hangs, or wait until the cluster is less busy"
    return [Finding(name, "failed", f"no answer within {limit_s:g} s", remedy)]


def failure(name: str, error: BaseException) -> Finding:
    """A failed row of an error; this package's own errors say `what is wrong: the remedy`."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, DwmError):
        found, separator, remedy = str(error).rpartition(": ")
        return Finding(name, "failed", found if separator else remedy, remedy if separator else "")
    if isinstance(error, ImportError):
        return Finding(name, "failed", lines[0], "install ray_dwm with its dependencies on all nodes, or submit a job")
    # Ray's own errors tell the reason in their last line, torch's in their first.
    line = lines[-1 if isinstance(error, ray.exceptions.RayError) else 0] if lines else ""
    return Finding(name, "failed", f"{type(error).__name__}: {line}", "look into the logs of Ray (/tmp/ray)")


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether the run cannot work as things are."""
    return any(finding.state == "failed" for finding in findings)


def show(findings: list[Finding], console: Console) -> None:
    """Print the table, and a last line that counts."""
    table = Table(title="ray-dwm doctor", title_justify="left", show_lines=True)
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", ratio=3, overflow="fold")
    table.add_column("remedy", ratio=2, overflow="fold")
    for row in findings:
        table.add_row(row.check, Text(row.state, style=_COLOURS[row.state]), Text(row.found), Text(row.remedy))
    console.print(table)
    counts = {state: sum(row.state == state for row in findings) for state in _COLOURS}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))


def to_json(findings: list[Finding]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)
