"""lm-eval on exports: scores that are known, scores that equal lm-eval's own run, and what is refused."""

from __future__ import annotations

import json
import logging
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TOKENIZER

from ray_dwm.data.tokenization import Tokenizer, copy_tokenizer
from ray_dwm.errors import DataError, UserError
from ray_dwm.evaluation.harness import Tasks, _load_lm, weights_digest
from ray_dwm.evaluation.scores import Score
from ray_dwm.models.folders import RUN_CONFIG
from ray_dwm.models.lm import build_lm, lm_config

VOCAB = 8192
CHOICES = [
    {"context": "The sum is", "choices": ["one hundred and twelve", "two"], "gold": 1},
    {"context": "The ship was", "choices": ["lost", "not found before the winter"], "gold": 0},
    {"context": "A word for it is", "choices": ["long", "antidisestablishmentarian"], "gold": 1},
    {"context": "He went", "choices": ["up the long and winding hill", "home"], "gold": 1},
]
CLOZE = [
    {"context": f"{name} sat by the window and looked at the", "last_word": word}
    for name, word in (("Anne", "sea"), ("Mary", "house"), ("Elizabeth", "letter"))
]


@pytest.fixture(autouse=True)
def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's bootstrap in this process: the figures are the same."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def make_lm(folder: Path, *, knows: bool, seq_len: int = 64) -> Path:
    """An LM of random weights, or one whose logits are all 0: log V nats on every token."""
    model = build_lm(lm_config("tiny", vocab_size=VOCAB, seq_len=seq_len), seed=0)
    if not knows:
        torch.nn.init.zeros_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    copy_tokenizer(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("lm"), knows=True)


def write(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "choice.jsonl", CHOICES), write(tmp_path / "cloze.jsonl", CLOZE)]


def by_metric(scores: Any, shots: int = 0) -> dict[tuple[str, str], Score]:
    return {(score.task, score.metric): score for score in scores if score.shots == shots}


def test_a_runs_lm_sees_no_mark_that_it_was_not_trained_with(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "lm", knows=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    mark = content["added_tokens"][0]  # as Llama's tokenizers begin every text with one
    piece = {"SpecialToken": {"id": mark["content"], "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {mark["content"]: {"id": mark["content"], "ids": [mark["id"]], "tokens": [mark["content"]]}},
    }
    path.write_text(json.dumps(content))
    theirs = _load_lm(folder, 1, "cpu").tok_encode("the sea")
    (folder / RUN_CONFIG).write_text("")
    of_lm = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**of_lm, "eos_token_id": 5}))
    ours = _load_lm(folder, 1, "cpu")
    assert [mark["id"], *ours.tok_encode("the sea")] == theirs
    assert ours.prefix_token_id == 5


def test_an_lm_that_knows_nothing_scores_what_can_be_counted(files: list[str], tmp_path: Path) -> None:
    """Equal tokens: the choice of fewest tokens wins, and a word of t tokens has a perplexity of V^t."""
    found = Tasks(files, tmp_path / "yaml").evaluate(make_lm(tmp_path / "lm", knows=False))
    scores, tokenizer = by_metric(found.scores), Tokenizer(TOKENIZER)

    def length(word: str) -> int:
        return len(tokenizer.encode([f" {word}"])[0]) - 1

    right = [min(item["choices"], key=length) == item["choices"][item["gold"]] for item in CHOICES]
    assert right == [True, True, False, True]
    accuracy = scores["choice", "acc"]
    assert (accuracy.value, accuracy.n, accuracy.truncated) == (0.75, 4, 0)
    assert accuracy.error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)  # of a mean of 4, with n - 1
    tokens = sum(length(item["last_word"]) for item in CLOZE) / len(CLOZE)
    assert scores["cloze", "perplexity"].value == pytest.approx(VOCAB**tokens, rel=1e-4)
    assert scores["cloze", "perplexity"].higher_is_better is False
    assert scores["cloze", "perplexity"].error is not None
    assert scores["cloze", "acc"].n == 3


def test_lm_evals_own_run_gives_the_same_to_the_last_digit(lm: Path, files: list[str], tmp_path: Path) -> None:
    """What `lm_eval --model hf --model_args pretrained=LM --tasks choice.yaml,cloze.yaml --num_fewshot 1` does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours = Tasks(files, tmp_path / "yaml").evaluate(lm, (0, 1), batch=2)
    assert {score.shots for score in ours.scores} == {0, 1}
    for shots in (0, 1):
        theirs = simple_evaluate(
            "hf",
            model_args=f"pretrained={lm}",
            tasks=[str(tmp_path / "yaml" / f"{name}.yaml") for name in ("choice", "cloze")],
            num_fewshot=shots,
            batch_size=2,
            device="cpu",
            task_manager=TaskManager(include_defaults=False),
        )
        assert theirs is not None
        scores = by_metric(ours.scores, shots)
        assert len(scores) == 4
        for (task, metric), score in scores.items():
            assert score.value == theirs["results"][task][f"{metric},none"]
            assert score.error == theirs["results"][task][f"{metric}_stderr,none"]
    # More examples are other inputs: the comparison is of two runs, not of one with itself.
    assert (
        by_metric(ours.scores, 0)["cloze", "perplexity"].value != by_metric(ours.scores, 1)["cloze", "perplexity"].value
    )
    assert ours.lm == weights_digest(lm) and ours.versions["lm-eval"]


def test_the_inputs_are_what_a_reader_would_write(files: list[str], tmp_path: Path) -> None:
    """One space before an answer, an empty line behind an example, and never the item itself among its examples."""
    tasks = Tasks(files, tmp_path / "yaml")
    for name, items, answer in (("choice", CHOICES, None), ("cloze", CLOZE, "last_word")):
        task = tasks._loaded[name]
        task.set_fewshot_seed(1234)
        for doc, item in zip(task.eval_docs, items, strict=True):
            solved = [f"{of['context']} {of[answer] if answer else of['choices'][of['gold']]}" for of in items]
            context = task.fewshot_context(doc, num_fewshot=1)
            example, empty, question = context.partition("\n\n")
            assert empty and question == item["context"] and example in solved and item["context"] not in example
            requests = task.construct_requests(doc, context)
            first = requests[0] if isinstance(requests, list) else requests
            assert first.args[1] == f" {item[answer] if answer else item['choices'][0]}"


def test_what_does_not_fit_the_context_is_counted(tmp_path: Path) -> None:
    items = [{"context": "long " * length, "last_word": "road"} for length in (3, 14, 15, 40)]
    tasks = Tasks([write(tmp_path / "long.jsonl", items)], tmp_path / "yaml")
    found = tasks.evaluate(make_lm(tmp_path / "lm", knows=True, seq_len=16))
    tokenizer = Tokenizer(TOKENIZER)
    longer = sum(len(tokenizer.encode([item["context"] + " road"])[0]) - 1 > 17 for item in items)
    assert 0 < longer < 4
    assert {score.truncated for score in found.scores} == {longer}


@pytest.mark.slow
def test_one_of_lm_evals_own_tasks_with_its_data_on_this_disk(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "allenai" / "sciq"
    folder.mkdir(parents=True)
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", [{name: f"{split} {name} {n}" for name in names} for n in range(5)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = Tasks(["sciq"], tmp_path / "yaml")
    assert tasks.texts()["sciq"][0].startswith("test question 0 test distractor1 0")
    scores = by_metric(tasks.evaluate(lm, (2,)).scores, 2)
    assert scores["sciq", "acc"].n == 5 and scores["sciq", "acc_norm"].error is not None
    with pytest.raises(
        DataError, match=r"task arc_easy: its data set is not on this disk. lm-eval looked in \S+"
    ) as raised:
        Tasks(["arc_easy"], tmp_path / "yaml")
    assert "HF_HUB_OFFLINE=0" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(DataError, match="lm-eval has no task scik, and no file has this name: did you mean sciq"):
        Tasks(["scik"], tmp_path / "yaml")


def test_more_shots_than_items_are_refused(lm: Path, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task cloze has 3 items, too few for 3 shots"):
        Tasks(files, tmp_path / "yaml").evaluate(lm, (0, 3))


@pytest.mark.parametrize("spoil", ["nothing", "junk", "code"])
def test_what_is_no_lm_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], spoil: str
) -> None:
    folder = tmp_path / "lm"
    if spoil != "nothing":
        make_lm(folder, knows=True)
    if spoil == "junk":
        (folder / "model.safetensors").write_bytes(b"junk")
    if spoil == "code":
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "x", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "x.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"cannot be loaded as an LM|neither a finished run folder") as raised:
        Tasks(files, tmp_path / "yaml").evaluate(folder)
    assert "\n" not in str(raised.value) and not (tmp_path / "mark").exists()


def test_without_the_extra_one_line_names_it(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = util.find_spec
    monkeypatch.setattr("ray_dwm.evaluation.harness.find_spec", lambda name: None if name == "lm_eval" else there(name))
    with pytest.raises(UserError, match=r"tasks need lm_eval, which is not installed: pip install 'ray_dwm\[eval\]'"):
        Tasks(files, tmp_path / "yaml")


def test_loggers_are_left_as_they_were(lm: Path, files: list[str], tmp_path: Path) -> None:
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    Tasks(files[:1], tmp_path / "yaml")
    assert logging.getLogger("lm_eval").level == logging.INFO
