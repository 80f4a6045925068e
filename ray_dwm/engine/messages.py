"""What a run tells people besides its figures: warnings and choices, to its output and to messages.log."""

from __future__ import annotations

from pathlib import Path

from ray_dwm import logs

MESSAGES = "messages.log"


def say(run_dir: Path, text: str) -> None:
    """One line, by one rank; the file is for those who do not see a worker's output, as on Ray."""
    logs.say(text, run=run_dir.name)
    note(run_dir, text)


def note(run_dir: Path, text: str) -> None:
    """The same, to the file alone."""
    with (run_dir / MESSAGES).open("a") as stream:
        stream.write(f"[{run_dir.name}] {text}\n")
