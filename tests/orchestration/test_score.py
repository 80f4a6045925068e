"""A DWM's scores as a job: the same as in one process, resumable, and good for a selection."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from local import sweep
from test_dwm_scores import saved

from ray_dwm.config import RunConfig, load
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.checks import read_plan
from ray_dwm.errors import UserError
from ray_dwm.orchestration import select as selecting
from ray_dwm.orchestration.score import score
from ray_dwm.selection.method import Task
from ray_dwm.selection.methods import score as scores_of
from ray_dwm.selection.scores import gather


def settings(shards: dict[str, Path], tmp_path: Path, *overrides: str) -> RunConfig:
    base = [
        f"data.train={shards['train']}",
        f"storage={tmp_path}",
        "selection.block_tokens=1600",
        "selection.dwm.rounds=3",
    ]
    dwm = [f"selection.dwm.folder={tmp_path / 'dwm'}", "selection.dwm.batch=16", "selection.dwm.rounds=3"]
    return load([], [*base, *dwm, *overrides])


@pytest.mark.usefixtures("driver")
def test_scores_of_a_job_and_a_selection_by_them(
    shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "dwm", bag=1.0)
    config, file = settings(shards, tmp_path), tmp_path / "scores.parquet"
    score(config, file)
    assert "the mean over 3 of them errs by" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"dwm", "scores.parquet"}
    pool = load_manifest(shards["train"])
    here = Task(options=config.selection, seed=0, pool=pool, targets={}, sweep=partial(sweep, block=77))
    table, local = pq.read_table(file), gather(scores_of("dwm", here), pool)
    assert table.column_names == ["sample_id", "domain", "score", "spread"]
    assert table["score"].to_numpy() == pytest.approx(local.scores, abs=1e-5)
    assert table["spread"].to_numpy().min() >= 0 < table["spread"].to_numpy().max()
    assert [pool.domain_names.index(name) for name in table["domain"].to_pylist()] == local.domains.tolist()

    options = ["data.selection=dwm", "selection.dwm.choice=highest", f"selection.budget={50 * pool.seq_len}"]
    folder = selecting.select(settings(shards, tmp_path, *options, f"selection.scores={file}"))
    assert "scores by dwm" not in capsys.readouterr().out
    record = json.loads((folder / "selection.json").read_text())
    assert record["domains"]["good"]["tokens_selected"] == 50 * pool.seq_len
    assert np.isclose(record["scores"]["selected"]["0"], np.sort(local.scores)[-50], atol=1e-5)
    assert load_manifest(folder).made_by["ordered"] is False

    again = ["data.selection=dwm", f"selection.budget={50 * pool.seq_len}", "selection.dwm.rounds=4"]
    with pytest.raises(UserError, match="are of another pool, target set, seed or method"):
        selecting.select(settings(shards, tmp_path, *again, f"selection.scores={file}"))


@pytest.mark.usefixtures("driver")
def test_a_curriculum_is_read_in_its_order(shards: dict[str, Path], tmp_path: Path) -> None:
    saved(tmp_path / "dwm", bag=1.0)
    overrides = ["data.selection=curriculum", "selection.curriculum.criterion=dwm", "selection.curriculum.start=0"]
    overrides += ["selection.curriculum.pacing=linear", "selection.curriculum.full=1", "selection.budget=1600"]
    overrides += ["train.global_batch=8", "selection.keep_scores=true", "weighting.method=uniform"]
    chosen = selecting.with_selection(settings(shards, tmp_path, *overrides))
    folder = Path(chosen.data.train)
    reader, table = open_shards(str(folder)), pq.read_table(folder / "scores.parquet")
    score_by_id = dict(zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    plan = read_plan(chosen, reader.manifest)
    read = np.concatenate([reader.take(plan.rows(k)).sample_ids for k in range(12)])
    scores = [score_by_id[i] for i in read.tolist()]
    assert scores == sorted(scores, reverse=True) and len(set(read.tolist())) == 96


@pytest.mark.parametrize("output", [".", "no/where.parquet", "there.parquet"])
def test_outputs_that_cannot_be_written(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.parquet").touch()
    with pytest.raises(UserError, match="name a new file in a folder that exists"):
        score(settings(shards, tmp_path), Path(output))
