"""Shards of real text with the tokenizer of the bundled corpus: planted documents that resemble a target set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ray_dwm.data.manifest import DomainStats, Manifest
from ray_dwm.data.shards import write_shard
from ray_dwm.data.tokenization import FOLDER, Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "corpus" / "tokenizer"
SEA = "The captain hauled the rope, and the ship ran before the wind; sailors cried from the mast into the storm. "
HILL = "Shepherds led sheep over green hills while bells rang slowly in the valley, far below the quiet chapel! "
CODE = "def parse(line): return [int(x) for x in line.split(',') if x.strip()] # None when the list is empty\n"


def text_shards(folder: Path, texts: dict[str, list[str]], seq_len: int = 48) -> Manifest:
    """A sequence for each text, cut or repeated to `seq_len` tokens, domains one after the other."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(TOKENIZER)
    names = [name for name, items in texts.items() for _ in items]
    rows = []
    for text in (text for items in texts.values() for text in items):
        ids = tokenizer.encode([text])[0][:-1]
        rows.append((ids * seq_len)[:seq_len])
    shard = write_shard(
        folder / "part-0.arrow",
        sample_ids=np.arange(len(rows), dtype=np.int64) + 100,
        domains=names,
        input_ids=np.array(rows),
        vocab_size=tokenizer.vocab_size,
    )
    shutil.copytree(TOKENIZER, folder / FOLDER)
    manifest = Manifest(
        folder=folder,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        files=(shard,),
        domains={
            name: DomainStats(rows=len(items), tokens=len(items) * seq_len, bytes_per_token=4.0)
            for name, items in texts.items()
        },
        made_by={},
    )
    manifest.write()
    return manifest


def shuffled_words(text: str, count: int, seed: int) -> list[str]:
    """Texts of the same words in other orders."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.permutation((text * 3).split())) for _ in range(count)]


def planted(root: Path, target: str = SEA) -> tuple[Path, Path]:
    """(pool, target set): a third of the pool, its domain `a_mix`, resembles the target; `b_other` does not."""
    mixed = [
        text for pair in zip(shuffled_words(SEA, 40, 1), shuffled_words(CODE, 40, 2), strict=True) for text in pair
    ]
    text_shards(root / "pool", {"a_mix": mixed, "b_other": shuffled_words(HILL, 40, 3)})
    text_shards(root / "target", {"t": shuffled_words(target, 30, 4)})
    return root / "pool", root / "target"
