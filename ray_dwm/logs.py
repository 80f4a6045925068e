"""What the program says, one line an event: text for people, JSON lines for a cluster's log collectors."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Style = Literal["text", "json"]

_LOGGER = logging.getLogger("ray_dwm")
_EVERYWHERE = ("run", "attempt", "rank", "step")
"""Fields of every JSON line, null where they are not known."""
_WARNING = "warning: "
_bound: dict[str, Any] = {}
"""What is the same for all that this process says."""


class _Stdout(logging.Handler):
    """Writes to standard output as it is at the time: it may be redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        print(self.format(record), file=sys.stdout, flush=True)


class TextLines(logging.Formatter):
    """`[run] text`."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        run = record.__dict__["fields"].get("run")
        return (f"[{run}] " if run else "") + record.getMessage()


class JsonLines(logging.Formatter):
    """One JSON object a line; the error's traceback is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage().removeprefix(_WARNING),
            **dict.fromkeys(_EVERYWHERE),
            **_bound,
            **record.__dict__["fields"],
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def readable(line: str) -> str:
    """A line of output as `TextLines` would have had it, where it is one of `JsonLines`; others as they are."""
    try:
        event = json.loads(line) if line.startswith("{") else {}
        text, level, run = event["message"], event["level"], event.get("run")
    except (ValueError, KeyError):
        return line
    if not (isinstance(text, str) and isinstance(level, str)):
        return line  # somebody else's
    kind = {"warning": _WARNING, "error": "error: "}.get(level, "")
    return (f"[{run}] " if run and level != "error" else "") + kind + text


_FORMATTERS: dict[Style, type[logging.Formatter]] = {"text": TextLines, "json": JsonLines}
_HANDLER = _Stdout()
_HANDLER.setFormatter(TextLines())
_LOGGER.addHandler(_HANDLER)
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False


def setup(style: Style) -> None:
    """Make this process say everything in a style from now on."""
    _HANDLER.setFormatter(_FORMATTERS[style]())


def style_of(wanted: str, worker: bool = False) -> Style:
    """The style that `tracking.logs` means here.

    Args:
        worker: this is a process whose output only Ray's log files have.
    """
    if wanted == "auto":
        return "json" if worker or in_job() else "text"
    return "json" if wanted == "json" else "text"


def in_job() -> bool:
    """Whether this is a Ray job, whose working folder is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def width(columns: int) -> int | None:
    """Columns of a table for people: None, the terminal's own, or so many where there is none, as in a job's log."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else columns


def in_json() -> bool:
    """Whether this process says everything in JSON."""
    return isinstance(_HANDLER.formatter, JsonLines)


def bind(**fields: Any) -> None:
    """Give all that this process says from now on these fields, in JSON."""
    _bound.update(fields)


def bound(name: str) -> Any:
    """What is bound to a field; None where nothing is."""
    return _bound.get(name)


def say(text: str, **fields: Any) -> None:
    """One event for people and for collectors. `warning: ...` is a warning; `run` is written before a text."""
    level = logging.WARNING if text.startswith(_WARNING) else logging.INFO
    _log(level, text, fields)


def record(text: str, cause: BaseException | None = None, **fields: Any) -> None:
    """One event for collectors alone; with a cause, or a field `error`, an error, and with its traceback."""
    if in_json():
        failed = cause is not None or "error" in fields
        _log(logging.ERROR if failed else logging.INFO, text, fields, cause)


def _log(level: int, text: str, fields: dict[str, Any], cause: BaseException | None = None) -> None:
    _LOGGER.log(level, text, extra={"fields": fields}, exc_info=cause)
