"""The driver's side of a run, without a cluster: what it asks of Ray Train, and what a SIGTERM makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from orchestration.test_watch import BEAT, leave
from synthetic import tiny_config

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.mesh import TIMEOUT_S
from ray_dwm.engine.rundir import record_failure, running_path, stop_path
from ray_dwm.errors import Stopped, TrainingError
from ray_dwm.orchestration import fit

WITHOUT_GPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "7",  # set by the user
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}


HEAVY = ("transformers", "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib")
CODE = f"""
import sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

def tracked(mode):
    return len(sinks(load([sys.argv[1]], [f"tracking.wandb={{mode}}"]))), "wandb" in sys.modules

import ray_dwm.orchestration.storage_visit
print("a node's visit:", loaded("ray", "torch"))
import ray_dwm.orchestration.dwm_service
print("the actor:", loaded("ray.data", "ray.train", "torch.distributed.tensor"))
import ray_dwm.orchestration.dwm_actor, ray_dwm.orchestration.train
from ray_dwm.config import load
from ray_dwm.orchestration.tracking import sinks
print(*tracked("off"))
import ray_dwm.orchestration.trial
print("the driver:", loaded(*{HEAVY}))
print(*tracked("offline"))
"""


def test_processes_import_neither_what_only_others_need_nor_what_is_switched_off(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config(shards, tmp_path)
    config.run_dir.mkdir()
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", CODE, str(tmp_path / "c.yaml")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["a node's visit: []", "the actor: []", "0 False", "the driver: []", "1 True"]


@pytest.mark.parametrize(("gpus", "environment"), [(0, WITHOUT_GPU), (1, {}), (0.5, {})])
def test_workers_see_no_gpu_that_they_did_not_ask_for(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, environment: dict[str, str]
) -> None:
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    trainer = fit._trainer(tiny_config(shards, tmp_path, f"cluster.gpus_per_worker={gpus}"), 0, {})
    assert trainer.run_config.worker_runtime_env == {"env_vars": environment}
    assert trainer.backend_config.timeout_s == TIMEOUT_S


class Signalled:
    """In place of a TorchTrainer: the driver gets a SIGTERM while it waits."""

    def __init__(self, config: RunConfig, beat_s: float | None) -> None:
        self.config, self.beat_s = config, beat_s

    def fit(self) -> None:
        """Where workers run, they see the request and end the run."""
        if self.beat_s is not None:
            running_path(self.config).touch()
            leave(self.config.run_dir, replace(BEAT, time_s=time.time() - self.beat_s))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_BLOCK, [])  # Python runs the handler here
        assert self.beat_s == 15 and stop_path(self.config).exists()
        record_failure(self.config, Stopped("a worker's word"))


class Interrupted:
    """In place of a TorchTrainer: Ctrl-C."""

    def __init__(self, config: RunConfig, beat_s: float | None) -> None:
        """Takes nothing from them."""

    def fit(self) -> None:
        """See TorchTrainer."""
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("trainer", "beat_s", "kind", "told"),
    [
        (Signalled, 15, TrainingError, "a worker's word"),
        (Signalled, 31, Stopped, "stopped while no worker ran: the same command continues"),  # rank 0 was killed
        (Signalled, None, Stopped, "stopped while no worker ran: the same command continues"),
        (Interrupted, None, KeyboardInterrupt, None),
    ],
)
def test_a_sigterm_is_answered_whether_workers_run_or_not(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: Callable[[RunConfig, float | None], Signalled],
    beat_s: float | None,
    kind: type[BaseException],
    told: str | None,
) -> None:
    config = tiny_config(shards, tmp_path, "weighting.method=uniform")
    config.run_dir.mkdir(parents=True)
    monkeypatch.setattr(fit, "_trainer", lambda config, until, figures: trainer(config, beat_s))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=told):
        fit.fit(config, check_data(config))
    assert signal.getsignal(signal.SIGTERM) == before
