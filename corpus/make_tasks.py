"""Makes corpus/tasks from the held-out sets, which no run of this corpus trains on.

    python corpus/make_tasks.py --corpus corpus --output corpus/tasks

*cloze*: the last word of a sentence, after it and the sentences before it. *next*: the sentence that follows, among
three others of the same domain. Sentences, and the order of choices, are drawn with a fixed seed. Items that share 13
words in a row with a training or target set, as verses of Kings do that stand in Chronicles too, are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ray_dwm.evaluation.contamination import Index

ITEMS = 200
CHOICES = 4
CONTEXT_WORDS = (20, 55)
"""Fewest and most words: with the answer it fits 128 tokens."""
NEXT_WORDS = (5, 20)
CLOZE_WORDS = (5, 35)
OTHERS = {"scripture", "jargon"}
"""Domains of the mixture that are prose, and in the public domain."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Dr|St|Esq|[A-Z]|e\.g|i\.e)\.$")
_LAST = re.compile(r"^(.*\s)([a-z]{4,})([.!?])$")
_PLAIN = re.compile(r"[\w ,;:.!?'()-]+")


def records(path: Path) -> list[dict[str, Any]]:
    """The documents of a .jsonl.zst file."""
    with path.open("rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return [json.loads(line) for line in lines]


def paragraphs(text: str) -> Iterator[list[str]]:
    """The sentences of each paragraph that is plain prose."""
    for paragraph in re.split(r"\n\s*\n", text):
        sentences: list[str] = []
        for part in _END.split(" ".join(paragraph.split())):
            if sentences and _ABBREVIATED.search(sentences[-1]):
                sentences[-1] += f" {part}"
            else:
                sentences.append(part)
        yield sentences


def pairs(documents: list[dict[str, Any]], words: tuple[int, int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(some sentences, the one of so many words that follows, the document they are from); none is used twice."""
    for document in documents:
        for sentences in paragraphs(document["text"]):
            context: list[str] = []
            for sentence in sentences:
                length = len(" ".join(context).split())
                whole = sentence[-1:] in ".!?" and sentence[:1].isupper() and _PLAIN.fullmatch(sentence)
                fits = words[0] <= len(sentence.split()) <= words[1]
                if whole and fits and CONTEXT_WORDS[0] <= length <= CONTEXT_WORDS[1]:
                    yield " ".join(context), sentence, document
                    context = []
                elif not whole or length > CONTEXT_WORDS[1]:
                    context = [sentence] if whole else []
                else:
                    context.append(sentence)


def origin(document: dict[str, Any]) -> dict[str, str]:
    """What an item says of where it is from."""
    return {"source": document["source"], "license": document["license"]}


def cloze(documents: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Items whose last word is to be found."""
    items = []
    for context, sentence, document in pairs(documents, CLOZE_WORDS):
        if match := _LAST.match(sentence):
            before = f"{context} {match[1].rstrip()}"
            items.append({"context": before, "last_word": match[2], **origin(document)})
    return [items[place] for place in sorted(rng.sample(range(len(items)), min(ITEMS, len(items))))]


def following(documents: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Items whose next sentence is to be told from others of the same domain."""
    found = list({sentence: (context, sentence, of) for context, sentence, of in pairs(documents, NEXT_WORDS)}.values())
    items = []
    for place in sorted(rng.sample(range(len(found)), min(ITEMS, len(found)))):
        context, sentence, document = found[place]
        domain = document["domain"]
        others = [other for other, (_, _, of) in enumerate(found) if other != place and of["domain"] == domain]
        choices = [found[other][1] for other in rng.sample(others, CHOICES - 1)]
        gold = rng.randrange(CHOICES)
        choices.insert(gold, sentence)
        items.append({"context": context, "choices": choices, "gold": gold, **origin(document)})
    return items


def clean(items: list[dict[str, Any]], corpus: Path) -> list[dict[str, Any]]:
    """The items that the guard of `ray-dwm evaluate` would not mark."""
    texts = [" ".join([item["context"], *item.get("choices", []), item.get("last_word", "")]) for item in items]
    index = Index({str(place): [text] for place, text in enumerate(texts)})
    files = [*sorted((corpus / "train").glob("*.zst")), *sorted((corpus / "target").glob("*.zst"))]
    marked = index.overlapping([document["text"] for document in records(file)] for file in files)
    return [item for place, item in enumerate(items) if not marked[str(place)]]


def main() -> None:
    """Write the task files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--output", type=Path, default=Path("corpus/tasks"))
    options = parser.parse_args()
    novels = records(options.corpus / "held_out" / "novels.jsonl.zst")
    mixture = [each for each in records(options.corpus / "held_out" / "mixture.jsonl.zst") if each["domain"] in OTHERS]
    options.output.mkdir(parents=True, exist_ok=True)
    tasks = {
        "novels_cloze": cloze(novels, random.Random(0)),
        "novels_next": following(novels, random.Random(1)),
        "others_next": following(mixture, random.Random(2)),
    }
    for name, drawn in tasks.items():
        items = clean(drawn, options.corpus)
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(items)} items")


if __name__ == "__main__":
    main()
