"""The guard: planted runs of words are found, whatever their case, and nothing else is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from texts import CODE, HILL, SEA, shuffled_words, text_shards

from ray_dwm.data.manifest import load_manifest
from ray_dwm.errors import DataError, ResourceError
from ray_dwm.evaluation import contamination
from ray_dwm.evaluation.contamination import Index, guard, overlaps, refuse

WORDS = [f"w{number}" for number in range(40)]
LETTERS = list("abcdefghijklm")


def killed(start: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def overlapping(index: Index, *blocks: list[str]) -> dict[str, int]:
    return index.overlapping(map(index.places, blocks))


def said(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        (said(WORDS[10:23]), 1),
        (said(WORDS[10:22]), 0),  # 12 words
        (said(WORDS[10:23]).upper().replace(" ", ",\n"), 1),
        (said([*WORDS[10:16], "w99", *WORDS[16:24]]), 0),
        (said([*WORDS[16:23], *WORDS[10:16]]), 0),  # another order
        (said(LETTERS), 1),
        (said(sorted(LETTERS, reverse=True)), 0),
        ("", 0),
    ],
)
def test_thirteen_words_in_a_row_and_no_fewer(text: str, hits: int) -> None:
    index = Index({"task": [said(WORDS[:30]), said(LETTERS), said(WORDS[:5])]})
    assert overlapping(index, [text]) == {"task": hits}
    assert index.judged == {"task": 2}


def test_the_same_letters_in_another_unicode_form_are_the_same() -> None:
    words = [f"\u00e9{number}" for number in range(13)]
    found = overlapping(Index({"task": [said(words)]}), [said(words).replace("\u00e9", "e\u0301")])
    assert found == {"task": 1}


def test_items_are_counted_once_and_for_their_own_set() -> None:
    index = Index({"a": [said(WORDS), "short"], "b": [said(WORDS[5:25]), said(LETTERS), said(WORDS)], "none": []})
    blocks = [[said(WORDS[6:20]), said(WORDS[7:24])], [said(WORDS)]]
    assert overlapping(index, *blocks) == {"a": 1, "b": 2, "none": 0}
    # Two texts are not read as one.
    assert overlapping(index, [said(WORDS[:12]), said(WORDS[12:24])]) == {"a": 0, "b": 0, "none": 0}


def test_against_a_search_by_hand() -> None:
    """Random words of a small vocabulary, so that runs of 3 are shared by chance."""
    rng = np.random.default_rng(0)
    drawn = [said([f"v{x}" for x in rng.integers(0, 12, size=12)]) for _ in range(60)]
    items, texts = drawn[:40], drawn[40:]
    runs = {tuple(text.split()[i : i + 3]) for text in texts for i in range(10)}
    expected = sum(any(tuple(item.split()[i : i + 3]) in runs for i in range(10)) for item in items)
    assert 0 < expected < 40
    assert overlapping(Index({"x": items}, words=3), texts[:7], texts[7:]) == {"x": expected}


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """A pool that holds SEA as it is, and HILL and CODE only in other orders; a target set of HILL."""
    text_shards(tmp_path / "pool", {"sea": [SEA], "other": shuffled_words(HILL + CODE, 6, seed=0)})
    text_shards(tmp_path / "target", {"hill": [HILL]})
    return {name: str(tmp_path / name) for name in ("pool", "target")}


def test_tasks_against_training_and_target_sets(sets: dict[str, str]) -> None:
    sea, hill = SEA.upper(), HILL.replace(",", " --")
    found = guard(
        {"clean": [CODE * 2] * 2, "mixed": [sea, hill, CODE * 2, "x"]}, sets["pool"], {"target": sets["target"]}
    )
    counts = {(of.what, of.against): (of.overlapping, of.judged, of.items) for of in found}
    assert counts == {
        ("clean", "the training set"): (0, 2, 2),
        ("mixed", "the training set"): (1, 3, 4),
        ("clean", "the target set"): (0, 2, 2),
        ("mixed", "the target set"): (1, 3, 4),
        ("the target set", "the training set"): (0, 1, 1),
    }
    told = [str(of) for of in found if of.what == "mixed"]
    assert "1 of 3 items of mixed (33.33%) share 13 words in a row with the training set, 1 are too short" in told[0]


def test_a_target_set_that_is_trained_on_is_told(sets: dict[str, str]) -> None:
    (found,) = [of for of in guard({}, sets["pool"], {"sea": sets["pool"]}) if of.what == "target set sea"]
    assert found.share == 1.0
    with pytest.raises(DataError, match=r"items of target set sea .* more than --max-overlap = 0.5 allows"):
        refuse([found], 0.5, "--max-overlap")
    refuse([found], 1.0, "--max-overlap")
    refuse([], 0.0, "--max-overlap")


def test_what_is_known_is_not_read_again(sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"one": [SEA], "two": [HILL]}
    first = guard(tasks, sets["pool"], {"target": sets["target"]})
    monkeypatch.setattr(contamination, "_Reader", lambda *given: pytest.fail("the shards were read again"))
    assert guard(tasks, sets["pool"], {"target": sets["target"]}, first) == first
    with pytest.raises(pytest.fail.Exception):
        guard({**tasks, "two": [CODE]}, sets["pool"], {}, first)


def test_rows_that_follow_each_other_are_one_text(tmp_path: Path) -> None:
    """The rows were cut within a sentence; only of these two rows together are 13 words in a row."""
    text = said([f"number{n}" for n in range(20)])
    manifest = text_shards(tmp_path / "pool", {"d": [text[:90], text[90:]]}, seq_len=30)
    pieces = contamination._Reader(Index({}), manifest.folder).texts(0)
    assert len(pieces) == 1
    found = overlaps({"task": [pieces[0]]}, {"pool": manifest})
    assert found[0].overlapping == 1
    assert all(len(row.split()) < 20 for row in contamination.row_texts(manifest))


def test_several_processes_find_the_same(sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    against = {"the training set": load_manifest(sets["pool"])}
    tasks = {"sea": [SEA, CODE, SEA.upper()], "hill": [HILL]}
    alone = overlaps(tasks, against)
    monkeypatch.setattr(contamination, "_BLOCKS_ALONE", 0)
    monkeypatch.setattr(contamination._Reader, "places", lambda *given: pytest.fail("read by this process"))
    assert overlaps(tasks, against) == alone
    assert [of.overlapping for of in alone] == [2, 0]


def test_a_killed_process_is_said(sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_BLOCKS_ALONE", 0)
    monkeypatch.setattr(contamination, "_places", killed)
    with pytest.raises(ResourceError, match="looked for overlaps with the training set was killed"):
        overlaps({"task": [SEA]}, {"the training set": load_manifest(sets["pool"])})


def test_what_takes_long_says_how_far_it_is(
    sets: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contamination, "_TELL_S", 0.0)
    monkeypatch.setattr(contamination, "_BLOCK_ROWS", 1)
    manifest = load_manifest(sets["pool"])
    assert manifest.rows > 2
    overlaps({"task": [SEA]}, {"the training set": manifest})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == manifest.rows - 1  # the last is the end
    assert lines[0].startswith(f"looking for overlaps with the training set: {1 / manifest.rows:.0%} read, about 0 min")


def test_shards_without_a_tokenizer_are_refused(shards: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no tokenizer beside its shards"):
        guard({"task": [SEA]}, str(shards["train"]), {})
