"""A DWM's scores for a pool: averages over batches by hand and by whole forwards, and DWMs that cannot score it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local import task
from synthetic import VOCAB, make_shards
from torch import Tensor

from ray_dwm.config import build
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import UserError
from ray_dwm.models.dwm import DataWeightingModel, build_dwm, dwm_shape
from ray_dwm.models.folders import save_dwm
from ray_dwm.selection import curriculum, dwm
from ray_dwm.selection.choose import highest
from ray_dwm.selection.dwm import joint_scores
from ray_dwm.selection.methods import score
from ray_dwm.selection.scores import gather


def saved(folder: Path, seed: int = 0, bag: float = 0.0, lm_features: bool = False, tokenizer: str = "0" * 64) -> Path:
    """A DWM whose head says something, and whose bag likes the vocabulary's upper half."""
    model = build_dwm(dwm_shape("xs", VOCAB, lm_features), seed)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.bag.weight[32:] = bag
    save_dwm(folder, model.shape, model.state_dict(), {"tokenizer_sha256": tokenizer})
    return folder


class FirstColumn(DataWeightingModel):
    """A score that is the encoding's first column, and `gain` times the batch's largest value in the second."""

    def __init__(self, gain: float = 0.0) -> None:
        super().__init__(dwm_shape("xs", VOCAB))
        self.gain = gain

    def scores(self, encoded_BE: Tensor, statistics_BS: Tensor | None = None) -> Tensor:
        return encoded_BE[:, 0] * (1 + self.gain * encoded_BE[:, 1].max()) + 100 * encoded_BE[0, 0]


def plan(rows: int, batch: int) -> ReadPlan:
    return ReadPlan(rows_per_file=(rows,), global_batch=batch, seed=4, block_rows=2, window_blocks=3)


def test_scores_are_centred_in_their_batch() -> None:
    """A batch of all rows: what is added to all scores of a batch, here 100 times the first one's, says nothing."""
    encoded = np.array([[3.0, 0], [1, 0], [2, 0], [6, 0]], dtype=np.float32)
    scores, spread = joint_scores(FirstColumn(), encoded, plan(4, 4), rounds=3)
    assert scores == pytest.approx([0, -2, -1, 3], abs=1e-4)
    assert spread == pytest.approx([0] * 4, abs=1e-3)


def test_the_spread_by_hand() -> None:
    """Two batches of two, over two rounds: the centred score of a pair (a, b) is (a - b) / 2."""
    values = np.array([1.0, 2, 4, 8])
    encoded = np.stack([values, 0 * values], axis=1).astype(np.float32)
    p = plan(4, 2)
    centred = np.zeros((2, 4))
    for epoch in range(2):
        for k in range(2):
            a, b = p.rows(2 * epoch + k)
            centred[epoch, a] = (values[a] - values[b]) / 2
            centred[epoch, b] = -centred[epoch, a]
    scores, spread = joint_scores(FirstColumn(), encoded, p, rounds=2)
    assert scores == pytest.approx(centred.mean(axis=0), abs=1e-4)
    assert spread == pytest.approx(np.abs(centred[0] - centred[1]) / np.sqrt(2), abs=1e-4)
    assert spread.max() > 0.1


def test_every_row_counts_once_a_round_also_what_fills_no_batch(tmp_path: Path) -> None:
    """23 rows in batches of 8, by whole forwards of the DWM on the same batches."""
    folder = saved(tmp_path / "dwm")
    make_shards(tmp_path / "pool", good=12, noise=11)
    job = task(tmp_path / "pool", {}, seed=9, dwm={"folder": str(folder), "rounds": "3", "batch": "8"})
    blocks = list(score("dwm", job))
    model = dwm._model(str(folder))
    ids = torch.from_numpy(open_shards(str(tmp_path / "pool")).take(np.arange(23)).input_ids.astype(np.int64))
    p = ReadPlan(rows_per_file=job.pool.rows_per_file, global_batch=8, seed=9)
    found: dict[int, list[float]] = {row: [] for row in range(23)}
    for epoch in range(3):
        order = p.at(epoch, np.arange(23)).tolist()
        for batch, counted in ((order[:8], order[:8]), (order[8:16], order[8:16]), (order[15:], order[16:])):
            with torch.no_grad():
                scores = model(ids[batch])
            centred = (scores - scores.mean()).tolist()
            for row in counted:
                found[row].append(centred[batch.index(row)])
    expected = np.array(list(found.values()))
    assert expected.shape == (23, 3)
    assert np.concatenate([block["score"] for block in blocks]) == pytest.approx(expected.mean(axis=1), abs=1e-5)
    spread = expected.std(axis=1, ddof=1)
    assert np.concatenate([block["spread"] for block in blocks]) == pytest.approx(spread, abs=1e-5)
    assert spread.min() > 1e-4


def test_what_the_dwm_likes_is_found_whatever_the_blocks(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dwm", bag=1.0)
    make_shards(tmp_path / "pool", good=40, noise=60)
    scores = []
    for block in (50, 13):
        job = task(tmp_path / "pool", {}, block=block, dwm={"folder": str(folder), "batch": "16"})
        scores.append(gather(score("dwm", job), job.pool))
    assert scores[0].scores == pytest.approx(scores[1].scores, abs=1e-5)
    assert not scores[0].domains[highest(job, scores[0], 40)].any()
    assert job.notes["deviation"]["over_rows"] > job.notes["deviation"]["over_rounds"] > 0
    ordered = task(tmp_path / "pool", {}, curriculum={"criterion": "dwm"}, dwm={"folder": str(folder), "batch": "16"})
    assert np.array_equal(gather(score("curriculum", ordered), job.pool).scores, scores[0].scores)
    assert not scores[0].domains[curriculum.choose(ordered, scores[0], 100)[:10]].any()


def test_choice(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dwm", bag=1.0)
    make_shards(tmp_path / "pool", good=40, noise=60)
    picks = []
    for choice in ("highest", "drawn"):
        job = task(tmp_path / "pool", {}, dwm={"folder": str(folder), "batch": "16", "choice": choice})
        scored = gather(score("dwm", job), job.pool)
        picks.append(scored.scores[dwm.choose(job, scored, 20)].sum())
    assert picks[0] == np.sort(scored.scores)[-20:].sum() > picks[1]


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({}, {"folder": ""}, "selection.dwm.folder is empty"),
        ({}, {"folder": "/nowhere"}, "/nowhere is not a readable DWM folder"),
        ({"tokenizer": "1" * 64}, {}, "was learnt with another tokenizer"),
        ({"lm_features": True}, {}, "looks at the LM's loss and entropy"),
        ({}, {"batch": "21"}, "selection.dwm.batch is 21, the pool .* has 20 sequences"),
        ({}, {"batch": "1"}, "selection.dwm.batch is 1: it must be at least 2"),
        ({}, {"rounds": "1"}, "selection.dwm.rounds is 1: it must be at least 2"),
    ],
)
def test_dwms_that_cannot_score_a_pool_are_refused(
    tmp_path: Path, made: dict[str, Any], options: dict[str, str], message: str
) -> None:
    folder = saved(tmp_path / "dwm", **made)
    make_shards(tmp_path / "pool", good=10, noise=10)
    with pytest.raises(UserError, match=message) as raised:
        given = build(SelectionConfig, {"dwm": {"folder": str(folder), "batch": "8", **options}})
        dwm.check(given, load_manifest(tmp_path / "pool"), 4)
    assert "\n" not in str(raised.value)


def test_scores_depend_on_what_the_dwm_is_not_on_where_it_lies(tmp_path: Path) -> None:
    def depends(folder: Path, **options: str) -> dict[str, Any]:
        return dwm.depends(build(SelectionConfig, {"dwm": {"folder": str(folder), **options}}))

    a, copy, other = saved(tmp_path / "a"), saved(tmp_path / "b"), saved(tmp_path / "c", seed=1)
    assert depends(a) == depends(copy, choice="highest") != depends(other)
    assert depends(a) != depends(a, rounds="3")
