"""Evaluation counts every sequence once, whatever the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gloo import run
from synthetic import VOCAB, make_shards

from ray_dwm.config import ParallelConfig
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.evaluate import mean_loss, spread_rows, stream
from ray_dwm.engine.mesh import all_sum, init_mesh
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.models.lm import build_lm, lm_config

ROWS = 7


def evaluated(folder: str, sequences: int) -> tuple[float, int, int]:
    """(loss, tokens that counted, sequences on rank 0)."""
    mesh = init_mesh()
    model = parallelize(build_lm(lm_config("tiny", vocab_size=VOCAB, seq_len=16), 0), mesh, "fp32", ParallelConfig())
    reader = open_shards(folder)
    batches = list(stream(reader, spread_rows(reader, sequences), 2, 16, torch.device("cpu")))
    counted = sum(int(all_sum(batch.mask.sum())) for batch in batches)
    return mean_loss(model, batches), counted, sum(len(batch) for batch in batches)


@pytest.mark.parametrize("sequences", [ROWS, 100, 5, 1])
def test_two_ranks_count_what_one_counts(tmp_path: Path, sequences: int) -> None:
    make_shards(tmp_path / "set", good=ROWS, noise=0, files=1)
    one, two = (run(w, tmp_path / str(w), evaluated, str(tmp_path / "set"), sequences) for w in (1, 2))
    counted = min(sequences, ROWS)
    assert one[1] == two[1] == counted * 15
    assert two[2] == math.ceil(counted / 2)
    assert two[0] == pytest.approx(one[0], rel=1e-6)
