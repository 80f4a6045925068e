"""Tasks through lm-eval, which is an extra: the same code counts for its own tasks and for task files."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ray_dwm.data.manifest import file_sha256
from ray_dwm.data.records import read_json
from ray_dwm.errors import DataError, UserError, first_line
from ray_dwm.evaluation.scores import Evaluation, Score
from ray_dwm.evaluation.taskfile import find_tasks, write_task
from ray_dwm.models.folders import RUN_CONFIG, lm_folder

_PACKAGES = ("lm-eval", "datasets", "transformers", "torch", "ray-dwm")


def require_lm_eval() -> None:
    """Make sure that lm-eval and what its `hf` backend needs are there.

    Raises:
        UserError: naming the extra.
    """
    missing = [name for name in ("lm_eval", "accelerate", "datasets") if find_spec(name) is None]
    if missing:
        raise UserError(f"tasks need {missing[0]}, which is not installed: pip install 'ray_dwm[eval]'")


def require_lm(lm: Path) -> Path:
    """Where the LM of a run folder or a Hugging Face folder lies.

    Raises:
        UserError: the folder is neither.
    """
    path = lm_folder(lm)
    if not (path / "config.json").is_file():
        raise UserError(f"{lm} is neither a finished run folder nor a Hugging Face folder: name one of these")
    return path


class Tasks:
    """Some tasks, ready to be scored on any number of LMs."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Read task files and data sets.

        Args:
            names: task files, folders of them, and names of lm-eval's own tasks.
            folder: where lm-eval's YAML tasks of the files, and their data, are written.

        Raises:
            UserError: lm-eval is not installed.
            DataError: a task is unknown, a file is not good, or a data set is not on this disk.
        """
        require_lm_eval()
        files, others = find_tasks(names)
        self.sha256 = {task.name: task.sha256 for task in files}
        self._items = {task.name: len(task.items) for task in files}
        self._specs = [*(str(write_task(task, folder)) for task in files), *others]
        self._manager = _manager(bool(others))
        for name in others:
            if name not in self._manager.all_tasks:
                near = get_close_matches(name, self._manager.all_tasks, n=1)
                hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them"
                raise DataError(f"lm-eval has no task {name}, and no file has this name: {hint}")
        self._loaded = self._load()

    def _load(self) -> dict[str, Any]:
        """lm-eval's tasks by name; new ones, for it remembers in a task how it was scored."""
        found: dict[str, Any] = {}
        for spec in self._specs:
            try:
                with _quiet():
                    found |= self._manager.load([spec])["tasks"]
            except Exception as error:  # datasets raises many kinds for what it does not find
                raise DataError(f"{self._told(spec)} ({first_line(error)})") from None
        return found

    def _told(self, spec: str) -> str:
        from datasets import config

        if Path(spec).suffix:
            return f"task {Path(spec).stem} cannot be loaded by lm-eval"
        return (
            f"task {spec}: its data set is not on this disk. lm-eval looked in {config.HF_DATASETS_CACHE} and in the "
            "working folder: put it there, set HF_HOME to where it is, or let it be fetched with HF_HUB_OFFLINE=0"
        )

    def texts(self) -> dict[str, list[str]]:
        """Name of each task -> all texts of each item, answers too, as one string: what must not be trained on."""
        return {name: [" ".join(_strings(doc)) for doc in task.eval_docs] for name, task in self._loaded.items()}

    def check_shots(self, shots: Sequence[int]) -> None:
        """Make sure that task files have the examples that are asked for.

        Raises:
            DataError: one has too few.
        """
        for name, items in self._items.items():
            if max(shots) >= items:
                raise DataError(
                    f"task {name} has {items} items, too few for {max(shots)} shots and one that is scored: "
                    f"ask for at most {items - 1}"
                )

    def evaluate(
        self,
        lm: Path,
        shots: Sequence[int] = (0,),
        batch: int = 32,
        step: int | None = None,
        tokens: int | None = None,
    ) -> Evaluation:
        """Score an LM folder with lm-eval's `hf` backend, on a GPU where there is one.

        Args:
            lm: a run folder or a Hugging Face folder.
            shots: numbers of examples in the context; all tasks are scored with each.
            batch: inputs in one forward pass.
            step, tokens: of the LM's training, where they are known; they are only noted.

        Raises:
            UserError: the folder is none, or a task has too few examples.
        """
        self.check_shots(shots)
        path = require_lm(lm)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with _quiet():
            model = _load_lm(path, batch, device)
            scores = [score for number in dict.fromkeys(shots) for score in self._score(model, number)]
        return Evaluation(
            lm=weights_digest(path),
            step=step,
            tokens=tokens,
            batch=batch,
            device=device,
            versions=versions(),
            tasks=self.sha256,
            scores=scores,
        )

    def _score(self, model: Any, shots: int) -> list[Score]:
        from lm_eval.evaluator import simple_evaluate

        loaded = self._load()
        try:
            given = {"tasks": list(loaded.values()), "task_manager": self._manager}
            found = simple_evaluate(model, num_fewshot=shots, **given)
        except (ValueError, AssertionError, ArithmeticError) as error:  # as where a data set has no examples to show
            raise DataError(f"lm-eval cannot score {', '.join(loaded)} with {shots} shots: {error}") from None
        scores = []
        for name in loaded:
            cut = sum(_is_cut(model, sample["arguments"]) for sample in found["samples"][name])
            for metric, value, error, better in _figures(found, name):
                scores.append(
                    Score(
                        task=name,
                        metric=metric,
                        shots=found["n-shot"][name],
                        value=value,
                        error=error,
                        n=found["n-samples"][name]["effective"],
                        truncated=cut,
                        higher_is_better=better,
                        version=str(found["versions"].get(name)),
                    )
                )
        return scores


@lru_cache
def _manager(own: bool) -> Any:
    """lm-eval's index of tasks; thousands of files are read where it is to know its own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def _load_lm(path: Path, batch: int, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    # A run's own texts are packed without the marks that a tokenizer may set at the start: an end stands before each.
    given: dict[str, Any] = {}
    if (path / RUN_CONFIG).is_file():
        given = {"add_bos_token": False, "prefix_token_id": read_json(path / "config.json").get("eos_token_id")}
    try:
        return HFLM(pretrained=str(path), batch_size=batch, device=device, **given)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise UserError(f"{path} cannot be loaded as an LM by lm-eval: {first_line(error)}") from None


def _figures(found: Any, name: str) -> Iterator[tuple[str, float, float | None, bool | None]]:
    """(metric, value, standard error, whether high is good) of a task."""
    values = found["results"][name]
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        yield (
            metric if kind == "none" else key,
            float(value),
            float(error) if isinstance(error, int | float) else None,
            found["higher_is_better"].get(name, {}).get(metric),
        )


def _is_cut(model: Any, arguments: Sequence[Sequence[Any]]) -> bool:
    """Whether an input of an item is longer than the LM's context; the last token is only predicted."""
    texts = ("".join(part for part in pair if isinstance(part, str)) for pair in arguments)
    return any(len(model.tok_encode(text)) > model.max_length + 1 for text in texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def versions() -> dict[str, str]:
    """Of what decides the scores."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the package itself runs from a source tree
            continue
    return found


def weights_digest(lm: Path) -> str:
    """SHA-256 over an LM folder's weights."""
    digests = [file_sha256(path) for path in sorted(lm.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes out of what is printed; what it cuts is counted in the scores instead."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
