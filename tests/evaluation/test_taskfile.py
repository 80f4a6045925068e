"""Task files: what is read, what is refused, and what lm-eval is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ray_dwm.errors import DataError
from ray_dwm.evaluation.taskfile import find_tasks, read_task, write_task

CHOICE = {"context": "One and one is", "choices": ["two", "three"], "gold": 0}
CLOZE = {"context": "One and one is", "last_word": "two"}
TASKS = Path(__file__).resolve().parents[2] / "corpus" / "tasks"


def task_file(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"context": "a", "choices": ["b", "c"]}, "line 2: it has choices and no gold"),
        (
            {"context": "a", "choices": ["b", "c"], "gold": 2},
            "gold is 2: it must be the number of a choice, from 0",
        ),
        ({"context": "a", "choices": ["b", "c"], "gold": -1}, "gold is -1"),
        ({"context": "a", "choices": ["b", "c"], "gold": True}, "gold is True"),
        ({"context": "a", "choices": ["b", "c"], "gold": "b"}, "gold is 'b'"),
        ({"context": "a", "choices": ["b"], "gold": 0}, "choices must be a list of at least 2 texts"),
        ({"context": "a", "choices": ["b", " "], "gold": 0}, "choices must be a list of at least 2 texts"),
        ({"context": "a", "choices": "bc", "gold": 0}, "choices must be a list of at least 2 texts"),
        ({"context": " ", "choices": ["b", "c"], "gold": 0}, "context must be a text"),
        ({"choices": ["b", "c"], "gold": 0}, "context must be a text"),
        ({"context": "a"}, "either choices and gold, or last_word"),
        ({**CHOICE, "last_word": "c"}, "either choices and gold, or last_word"),
        ({"context": "a", "last_word": ""}, "last_word must be a text"),
        ({"context": "a\ud800", "last_word": "b"}, "context must be a text"),
        (CLOZE, "item 2 is of another kind than the first"),
        ([CHOICE], "an item is a JSON object"),
    ],
)
def test_what_is_no_item_is_refused_by_line(tmp_path: Path, second: object, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, (CHOICE, second))))
    with pytest.raises(DataError) as raised:
        read_task(path)
    assert message in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "cannot be read"),
        ("torn.jsonl", '{"context": ', "line 1: no JSON"),
        ("one.jsonl", json.dumps(CHOICE), "has 1 items"),
        ("a task.jsonl", "\n".join([json.dumps(CHOICE)] * 2), "'a task': use letters"),
    ],
)
def test_what_is_no_task_file_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_task(tmp_path / name)


def test_other_fields_and_line_ends_within_texts_do_no_harm(tmp_path: Path) -> None:
    odd = {**CHOICE, "context": "One\u2028and\x85one is"}
    task = read_task(task_file(tmp_path / "t.jsonl", {**CHOICE, "license": "CC0"}, {**odd, "license": 3}))
    assert task.items == [CHOICE, odd]


def test_files_folders_and_lm_evals_own_names(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "empty").mkdir()
    first = task_file(tmp_path / "first.jsonl", CHOICE, CHOICE)
    for name in ("b", "a"):
        task_file(tmp_path / "more" / f"{name}.jsonl", CLOZE, CLOZE)
    files, others = find_tasks([str(first), "sciq", str(tmp_path / "more")])
    assert [task.name for task in files] == ["first", "a", "b"] and others == ["sciq"]
    with pytest.raises(DataError, match="has no task files"):
        find_tasks([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="two tasks are named first"):
        find_tasks([str(first), str(first)])


def test_lm_eval_is_given_the_items_alone(tmp_path: Path) -> None:
    task = read_task(task_file(tmp_path / "t.jsonl", {**CLOZE, "id": 1}, {**CLOZE, "id": "two"}))
    content = yaml.safe_load(write_task(task, tmp_path / "yaml").read_text())
    data = Path(content["dataset_kwargs"]["data_files"]["test"])
    assert [json.loads(line) for line in data.read_text().splitlines()] == [CLOZE, CLOZE]
    assert content["metadata"]["sha256"] == task.sha256


def test_the_bundled_tasks_are_good() -> None:
    files, _ = find_tasks([str(TASKS)])
    assert {task.name: len(task.items) for task in files} == {
        "novels_cloze": 172,
        "novels_next": 164,
        "others_next": 51,
    }
    for task in files:
        for item in task.items:
            assert len(set(item.get("choices", ()))) in (0, 4)
