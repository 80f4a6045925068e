"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from synthetic import VOCAB, make_shards, markov_rows, tiny_config  # noqa: F401

os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback clusters of the tests
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `train`, `target` and `held_out`."""
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "train", good=120, noise=136, seed=1)
    make_shards(root / "target", good=64, noise=0, seed=2, files=1)
    make_shards(root / "held_out", good=32, noise=0, seed=3, files=1)
    return {name: root / name for name in ("train", "target", "held_out")}


@pytest.fixture(scope="session")
def masked_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of which a random third of the tokens count."""
    root = tmp_path_factory.mktemp("masked")
    for seed, name in enumerate(("train", "target", "held_out"), start=1):
        make_shards(root / name, good=32, noise=32, seed=seed, masked=True)
    return {name: root / name for name in ("train", "target", "held_out")}
