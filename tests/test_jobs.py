"""jobs/*.py: every command that computes is a job, and all of them are made alike."""

from __future__ import annotations

import re
from pathlib import Path

from ray_dwm.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"prepare": "prepare_data", "select": "select_data"}
HERE = {"plan", "compare"}
"""Commands that need no cluster, or are an experiment's short form."""


def test_every_command_that_computes_is_a_job() -> None:
    commands = {command.__name__ for command in COMMANDS} - HERE
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {NAMES.get(name, name) for name in commands}


def test_the_jobs_differ_in_their_command_alone() -> None:
    texts = set()
    for path in (ROOT / "jobs").glob("*.py"):
        text = path.read_text()
        (command,) = re.findall(r"sys\.argv\.insert\(1, \"(\w+)\"\)", text)
        assert NAMES.get(command, command) == path.stem
        texts.add(text.replace(f'"{command}"', "").replace(f"ray-dwm {command}", "").replace(f"jobs/{path.name}", ""))
    assert len(texts) == 1
