"""All rows of a set through a function on a real cluster: blocks survive, and what goes wrong is named."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import ray
import torch

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.errors import DataError, ResourceError, TrainingError
from ray_dwm.orchestration.sweep import RaySweep, _folder_name, _raised, _run
from ray_dwm.selection.method import Arrays

pytestmark = pytest.mark.usefixtures("driver")


def test_finished_blocks_survive_a_failure(shards: dict[str, Path], tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()

    def halting(rows: Rows) -> Arrays:  # in here, so that it travels as it is
        if not (calls / "mended").exists() and 1100 in rows.sample_ids:
            raise DataError("no such luck")
        (calls / f"call-{uuid4().hex}").touch()
        return {"x": rows.sample_ids}

    sweep = RaySweep(tmp_path / "work", SelectionConfig(block_tokens=512, tasks=1))
    with pytest.raises(DataError, match="no such luck"):
        list(sweep("numbers", str(shards["train"]), halting))
    done = len(list((tmp_path / "work").glob("numbers-*/*.npz")))
    assert 0 < done < 8
    (calls / "mended").touch()
    blocks = list(sweep("numbers", str(shards["train"]), halting))
    assert np.array_equal(np.concatenate([b["x"] for b in blocks]), open_shards(str(shards["train"])).sample_ids())
    assert len(list(calls.glob("call-*"))) == 8


def test_a_sweep_over_some_rows_and_without_a_gpu(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(rows: Rows) -> Arrays:
        return {"ids": rows.sample_ids, "gpus": np.array(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))}

    resources = ray.cluster_resources()
    monkeypatch.setattr(ray, "cluster_resources", lambda: {**resources, "GPU": 1.0})
    rows = np.array([3, 250, 7, 7, 100])
    blocks = list(RaySweep(tmp_path, SelectionConfig())("some", str(shards["train"]), seen, rows, 2))
    assert [len(block["ids"]) for block in blocks] == [2, 2, 1]
    everything = open_shards(str(shards["train"])).sample_ids()
    assert np.concatenate([block["ids"] for block in blocks]).tolist() == everything[rows].tolist()
    assert {str(block["gpus"]) for block in blocks} == {""}


def test_sets_of_the_same_name_do_not_share_results(shards: dict[str, Path], tmp_path: Path) -> None:
    """A target set may be called `pool`."""

    def seen(rows: Rows) -> Arrays:
        return {"ids": rows.sample_ids}

    sweep = RaySweep(tmp_path, SelectionConfig())
    for name in ("train", "target"):
        found = np.concatenate([block["ids"] for block in sweep("n-grams of pool", str(shards[name]), seen, block=64)])
        assert found.tolist() == open_shards(str(shards[name])).sample_ids().tolist()


def test_folders_of_results_are_never_shared() -> None:
    asked = [("n-grams of a.b", "/x", None), ("n-grams of a-b", "/x", None), ("n-grams of a-b", "/y", None)]
    asked += [("x" * 300, "/x", None), ("../../x", "/x", None)]
    asked += [("n-grams of a-b", "/x", np.array(rows)) for rows in ([1, 2], [1, 3])]
    names = [_folder_name(*each) for each in asked]
    assert len(set(names)) == len(asked)
    assert all(len(name) < 100 and "/" not in name and name[0] != "." for name in names)


@pytest.mark.parametrize("option", [{"cpus_per_task": 9.0}, {"gpus_per_task": 0.5}])
def test_what_no_node_has_is_told_instead_of_waited_for(
    shards: dict[str, Path], tmp_path: Path, option: dict[str, float]
) -> None:
    with pytest.raises(ResourceError, match=r"no node .* lower selection.cpus_per_task or selection.gpus_per_task"):
        RaySweep(tmp_path, SelectionConfig(**option)).each("nothing", [1], print)  # type: ignore[arg-type]


def test_a_task_whose_process_dies_is_not_tried_for_ever(tmp_path: Path) -> None:
    def dying(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"a task's process was killed 4 times: .* lower selection.block_tokens"):
        RaySweep(tmp_path, SelectionConfig()).each("dying", [1], dying)


def test_errors_of_tasks_name_what_is_done_and_where(tmp_path: Path) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"/blocks/{number}")

    row = _run({"number": 7}, full, tmp_path)
    assert str(_raised("scores", row)).startswith("scores: No space left on device /blocks/7: free space, or use fol")
    other = str(_raised("scores", {**row, "host": "far"}))
    assert other.startswith("scores on node far, which must see what others see: No space left")
    assert isinstance(_raised("x", {**row, "failed": True}), TrainingError)

    def hungry(number: int) -> None:
        if not number:
            raise MemoryError
        raise torch.OutOfMemoryError(f"tried to allocate {number} GiB\nmore")

    told = _raised("scores", _run({"number": 7}, hungry, tmp_path))
    assert isinstance(told, TrainingError)
    assert str(told).startswith("scores: out of memory (tried to allocate 7 GiB): lower selection.block_tokens, sel")
    assert "out of memory (on the host): lower" in str(_raised("scores", _run({"number": 0}, hungry, tmp_path)))


def test_a_run_that_fails_in_a_task_has_failed(shards: dict[str, Path], tmp_path: Path) -> None:
    def diverging(rows: Rows) -> Arrays:
        raise TrainingError("the gradient is not finite")

    with pytest.raises(TrainingError, match="the gradient is not finite"):
        list(RaySweep(tmp_path, SelectionConfig())("nothing", str(shards["train"]), diverging))
