"""Tiny shards of two domains, one of which the target set resembles, and a configuration of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ray_dwm.config import RunConfig, load
from ray_dwm.data.manifest import DomainStats, Manifest
from ray_dwm.data.shards import write_shard

VOCAB = 64


def markov_rows(rows: int, seq_len: int, offset: int, seed: int) -> np.ndarray:
    """Sequences over half of the vocabulary in which each token is its predecessor + 1 or + 2."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 3, size=(rows, seq_len))
    return offset + (rng.integers(0, 32, size=(rows, 1)) + steps.cumsum(axis=1)) % 32


def make_shards(
    folder: Path,
    *,
    good: int,
    noise: int,
    seq_len: int = 16,
    seed: int = 0,
    files: int = 2,
    tokenizer_sha256: str = "0" * 64,
    masked: bool = False,
    counted_from: int = 0,
) -> Manifest:
    """Shards with `good` Markov rows (domain good) and `noise` random rows (domain noise).

    Where `masked`, a third of the tokens count, none of them before position `counted_from`.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    noise_rows = rng.integers(0, VOCAB, size=(noise, seq_len))
    ids = np.concatenate([markov_rows(good, seq_len, 32, seed), noise_rows])
    names = ["good"] * good + ["noise"] * noise
    order = rng.permutation(len(ids))
    mask = (rng.random(ids.shape) < 1 / 3) & (np.arange(seq_len) >= counted_from)
    shards = []
    for index, part in enumerate(np.array_split(order, files)):
        shards.append(
            write_shard(
                folder / f"part-{index}.arrow",
                sample_ids=part.astype(np.int64) + 1000 * seed,
                domains=[names[i] for i in part],
                input_ids=ids[part],
                vocab_size=VOCAB,
                loss_mask=mask[part] if masked else None,
            )
        )
    counts = {name: count for name, count in (("good", good), ("noise", noise)) if count}
    manifest = Manifest(
        folder=folder,
        seq_len=seq_len,
        vocab_size=VOCAB,
        eos_token_id=0,
        tokenizer_name="synthetic",
        tokenizer_sha256=tokenizer_sha256,
        files=tuple(shards),
        domains={k: DomainStats(rows=n, tokens=n * seq_len, bytes_per_token=1.0) for k, n in counts.items()},
        made_by={},
    )
    manifest.write()
    return manifest


def tiny_config(shards: dict[str, Path], storage: Path, *overrides: str) -> RunConfig:
    """A run of seconds: 8 sequences a step, an LM of 29k parameters."""
    base: list[Any] = [
        f"storage={storage}",
        f"data.train={shards['train']}",
        f"data.target={shards['target']}",
        f"data.held_out.test={shards['held_out']}",
        "lm.preset=tiny",
        "train.steps=6",
        "train.global_batch=8",
        "train.micro_batch=8",
        "train.lr=3e-3",
        "train.warmup_steps=2",
        "train.eval_every=3",
        "train.eval_sequences=16",
        "bilevel.every=2",
        "bilevel.warmup_steps=1",
        "bilevel.target_batch=8",
        "checkpoint.every=1000",  # the last step alone: a checkpoint costs what two bi-level steps do
        "cluster.workers=1",
        "tracking.wandb=off",
    ]
    return load([], [*base, *overrides])
