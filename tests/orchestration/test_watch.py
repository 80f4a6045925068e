"""Who failed first, told from what workers leave behind, without a cluster."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from ray_dwm.config import RunConfig
from ray_dwm.orchestration import watch
from ray_dwm.orchestration.watch import Beat, Watch, first_failure, hint, next_attempt

GIB = 2**30
BEAT = Beat(
    attempt=2,
    rank=0,
    node="a (10.0.0.1)",
    pid=1,
    memory_bytes=3 * GIB,
    node_used_bytes=15 * GIB,
    node_bytes=16 * GIB,
    step=40,
)
LOST = RuntimeError("Connection closed by peer [10.0.0.2]")
DIED = WorkerHealthCheckFailedError("a health check failed", ray.exceptions.ActorDiedError())


def leave(run_dir: Path, *beats: Beat) -> None:
    """What the workers have written; and a run that was at step 57."""
    (run_dir / "workers").mkdir()
    for beat in beats:
        (run_dir / "workers" / f"rank-{beat.rank:05d}.json").write_text(json.dumps(asdict(beat)))
    (run_dir / "metrics.jsonl").write_text('{"step": 57}\n')


def failed(rank: int, time_s: float, error: str) -> Beat:
    return replace(BEAT, rank=rank, node=f"n{rank}", error=error, time_s=time_s, step=41)


def test_the_earliest_that_could_tell(tmp_path: Path) -> None:
    leave(tmp_path, failed(0, 9.0, "RuntimeError: Connection closed"), failed(1, 5.0, "ModuleNotFoundError: No module"))
    told = first_failure(tmp_path, {0: LOST, 1: ModuleNotFoundError("No module")})
    assert told == (
        "rank 1 on n1, after step 41, holding 3.0 GiB of memory, 15.0 of 16.0 GiB there in use, failed first: "
        "ModuleNotFoundError: No module; the nodes differ: `ray-dwm doctor` compares them"
    )


def test_one_that_is_gone_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    leave(tmp_path, failed(0, 5.0, "RuntimeError: Connection closed"), replace(BEAT, rank=1, node="b (10.0.0.2)"))
    told = first_failure(tmp_path, {0: LOST, 1: DIED})
    assert told.startswith("rank 1 on b (10.0.0.2), after step 57, holding 3.0 GiB") and "dmesg" in told


def test_an_attempt_that_has_loaded_nothing_has_not_lost_the_runs_steps(tmp_path: Path) -> None:
    """Attempt 2 goes on from a checkpoint: "after step 0" would say that the run is at its beginning."""
    leave(tmp_path, replace(failed(0, 9.0, "OSError: x"), step=0))
    assert first_failure(tmp_path, {0: OSError("x")}).startswith(
        "rank 0 on n0, before the first step of attempt 2, holding 3.0 GiB"
    )


@pytest.mark.parametrize("beats", [[], [replace(BEAT, attempt=1, rank=1, error="of an attempt before")]])
def test_without_a_word_of_it_ray_is_quoted(tmp_path: Path, beats: list[Beat]) -> None:
    leave(tmp_path, *beats, replace(BEAT, rank=3))
    told = first_failure(tmp_path, {1: ValueError("first line\n  the cause\n")})
    assert told.startswith("rank 1, failed first: the cause; ")


def test_a_damaged_beat_is_passed_over(tmp_path: Path) -> None:
    leave(tmp_path)
    (tmp_path / "workers" / "rank-00001.json").write_text('{"rank": 1')
    assert first_failure(tmp_path, {1: LOST}).startswith("rank 1, failed first: Connection closed")
    assert first_failure(tmp_path, {}) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "lower train.micro_batch"),
        ("Task was killed due to the node running low on memory", "give the nodes more memory"),
        ("The actor is dead because its worker process has died.", "look at dmesg"),
        ("ncclInternalError: NCCL WARN", "the network between the nodes"),
        ("ValueError: x", "worker's log in the Ray dashboard"),
    ],
)
def test_hints(error: str, expected: str) -> None:
    assert expected in hint(error)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([], False),
        ([(0, 2, 15)], True),
        ([(0, 2, 31), (1, 2, 5)], False),
        ([(0, 1, 5), (1, 2, 5)], False),  # of the attempt before
    ],
)
def test_rank_0_lives_by_its_beats(tmp_path: Path, beats: list[tuple[int, int, float]], expected: bool) -> None:
    now = time.time()
    leave(tmp_path, *(replace(BEAT, rank=rank, attempt=attempt, time_s=now - ago) for rank, attempt, ago in beats))
    assert watch.is_beating(tmp_path) is expected


def test_attempts_are_counted_over_commands(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempts").write_text("damaged")
    assert next_attempt(tmp_path) == 1


class Written:
    """Keeps what would be exported."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def put(self, name: str, value: float) -> None:
        """See Exporter."""
        self.values[name] = value


def test_a_worker_exports_the_memory_of_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    # Where none is named it is the thread's, the node's first one.
    held = {torch.device("cuda", n): n * GIB for n in range(8)}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: held.get(device, 0))
    monkeypatch.setattr(watch.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    config, written = RunConfig(storage=str(tmp_path)), Written()
    config.run_dir.mkdir()
    with Watch(config, 1, 11, written):
        pass
    assert written.values["lm_worker_gpu_memory_bytes"] == 3 * GIB
    assert json.loads((config.run_dir / "workers" / "rank-00011.json").read_text())["rank"] == 11
