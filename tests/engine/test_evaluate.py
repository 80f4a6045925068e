"""Evaluation counts every sequence once, whatever the number of ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from gloo import run_all
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


ASKED = (ROWS, 100, 5, 1)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """`evaluated` by the number of ranks and of sequences that are asked for."""
    folder = tmp_path_factory.mktemp("evaluated")
    make_shards(folder / "set", good=ROWS, noise=0, files=1)
    calls = {(world, n): (world, str(folder / "set"), n) for world, n in itertools.product((1, 2), ASKED)}
    return run_all(folder, evaluated, calls)


@pytest.mark.parametrize("sequences", ASKED)
def test_two_ranks_count_what_one_counts(losses: dict[Any, Any], sequences: int) -> None:
    one, two = losses[1, sequences], losses[2, sequences]
    counted = min(sequences, ROWS)
    assert one[1] == two[1] == counted * 15
    assert two[2] == math.ceil(counted / 2)
    assert two[0] == pytest.approx(one[0], rel=1e-6)
