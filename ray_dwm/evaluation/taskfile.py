"""Tasks as plain JSONL, and the lm-eval tasks that are made from them, so that lm-eval alone counts.

A line is one item: a choice, {"context": ..., "choices": [...], "gold": 0}, or a cloze, {"context": ...,
"last_word": ...}; a file holds items of one kind. Other fields are passed over. Between context and answer stands one
space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_dwm.config.sections import NAME
from ray_dwm.data.manifest import file_sha256
from ray_dwm.errors import DataError

SUFFIX = ".jsonl"
_MEAN = {"aggregation": "mean", "higher_is_better": True}
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
}
_CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": "{{' ' + last_word}}",
    "target_delimiter": "",  # of this kind of task lm-eval puts it into examples alone
    "metric_list": [
        {"metric": "acc", **_MEAN},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file that has been read and found good."""

    path: Path
    items: list[dict[str, Any]]
    """Only what counts: context, choices and gold, or context and last_word."""
    sha256: str

    @property
    def name(self) -> str:
        """The task's name."""
        return self.path.name.removesuffix(SUFFIX)


def read_task(path: Path) -> TaskFile:
    """Read a task file and check every item.

    Raises:
        DataError: naming the file, the line and what it lacks.
    """
    path = path.expanduser().absolute()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path} cannot be read ({error}): name a {SUFFIX} file of items") from None
    task = TaskFile(path, [_item(path, number, line) for number, line in enumerate(lines, 1) if line.strip()], "")
    if not NAME.fullmatch(task.name):
        raise DataError(f"task file {path} gives its task the name {task.name!r}: use letters, digits, _ - and .")
    if len(task.items) < 2:
        raise DataError(f"task file {path} has {len(task.items)} items: a standard error needs at least 2")
    for number, item in enumerate(task.items, 1):
        if item.keys() != task.items[0].keys():
            raise DataError(f"task file {path}: item {number} is of another kind than the first: make it two files")
    return TaskFile(path, task.items, file_sha256(path))


def _item(path: Path, number: int, line: str) -> dict[str, Any]:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise DataError(f"task file {path}, line {number}: {what}")

    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"task file {path}, line {number}: no JSON ({error})") from None
    require(isinstance(record, dict), "an item is a JSON object with context, and choices and gold or last_word")
    require(_is_text(record.get("context")), "context must be a text that is not empty")
    require(
        ("choices" in record) != ("last_word" in record),
        "an item has either choices and gold, or last_word: give it one of the two",
    )
    if "last_word" in record:
        require(_is_text(record["last_word"]), "last_word must be a text that is not empty")
        return {"context": record["context"], "last_word": record["last_word"]}
    _check_choices(record, require)
    return {"context": record["context"], "choices": record["choices"], "gold": record["gold"]}


def _check_choices(record: dict[str, Any], require: Callable[[bool, str], None]) -> None:
    choices, gold = record["choices"], record.get("gold")
    require(
        isinstance(choices, list) and len(choices) >= 2 and all(map(_is_text, choices)),
        "choices must be a list of at least 2 texts, none of them empty",
    )
    require("gold" in record, "it has choices and no gold: gold is the number, from 0, of the right one")
    require(
        isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices),
        f"gold is {gold!r}: it must be the number of a choice, from 0 to {len(choices) - 1}",
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def is_path(name: str) -> bool:
    """Whether a task's name is that of a file or folder, and not one of lm-eval's own."""
    return name.endswith(SUFFIX) or "/" in name or Path(name).expanduser().is_dir()


def find_tasks(names: Sequence[str]) -> tuple[list[TaskFile], list[str]]:
    """Task files, those of folders too, and what is left: names of lm-eval's own tasks.

    Raises:
        DataError: a file is missing or not good, a folder has none, or two are of one name.
    """
    files: list[TaskFile] = []
    others: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        if not is_path(name):
            others.append(name)
            continue
        found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"folder {path} has no task files: it must hold *{SUFFIX}")
        files += map(read_task, found)
    known = [*(task.name for task in files), *others]
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise DataError(f"two tasks are named {twice[0]}: rename one of the files, or leave one out")
    return files, others


def write_task(task: TaskFile, folder: Path) -> Path:
    """Write NAME.jsonl and NAME.yaml, lm-eval's task of it; returns the latter, which `lm_eval --tasks` takes too."""
    folder.mkdir(parents=True, exist_ok=True)
    items = folder.absolute() / f"{task.name}{SUFFIX}"
    items.write_text("".join(json.dumps(item) + "\n" for item in task.items), encoding="utf-8")
    content = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}, "cache_dir": str(items.parent / ".cache")},
        "test_split": "test",
        "fewshot_split": "test",  # lm-eval leaves the item itself out of its examples
        **(_CLOZE if "last_word" in task.items[0] else _CHOICE),
        "metadata": {"version": 1.0, "sha256": task.sha256},
    }
    path = folder / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
