"""Layouts that a search tries, and what a plan says of the configured one, of elastic groups and of hosts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from synthetic import tiny_config

from ray_dwm.cli import main
from ray_dwm.config import load
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import gpu
from ray_dwm.errors import ConfigError, ResourceError
from ray_dwm.planning.estimate import HOST_USABLE, estimate
from ray_dwm.planning.inputs import job
from ray_dwm.planning.memory import host_bytes, run_peak
from ray_dwm.planning.plan import on_gpus, plan
from ray_dwm.planning.search import candidates, feasible, overrides, search

RECIPE = Path(__file__).parents[2] / "configs" / "1.3b.yaml"
SPEED = Speed(gpu=gpu("h100"), bf16=True, mfu=0.4)
LARGE = ["lm.preset=13b", "prepare.seq_len=2048", "train.precision=bf16", "weighting.method=uniform"]


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(6, {1, 2, 3, 6}), (7, {1, 2, 3, 4, 7}), (43, {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 22, 43})],
)
def test_micro_batches_need_not_divide_a_share(batch: int, sizes: set[int]) -> None:
    wanted = job(load([], ["cluster.workers=1", f"train.global_batch={batch}", f"train.micro_batch={batch}"]))
    assert {x.config.train.micro_batch for x in candidates(wanted, offload=False)} == sizes


def test_the_configured_layout_is_among_those_that_are_tried() -> None:
    """Though neither its micro-batch nor its chunk is one that a search would take."""
    words = ["parallel.shard=4", "train.micro_batch=5", "parallel.loss_chunk=3000", "cluster.workers=8"]
    wanted = job(load([], [*LARGE, "lm.preset=370m", *words]))
    first = next(candidates(wanted, offload=False))
    assert "parallel.shard=4" in overrides(estimate(first, SPEED))
    assert (first.config.train.micro_batch, first.config.parallel.loss_chunk) == (5, 3000)
    assert estimate(first, SPEED).step_seconds == estimate(wanted, SPEED).step_seconds
    best = search(wanted, SPEED).best
    assert best is not None
    assert best.step_seconds <= 1.005 * estimate(wanted, SPEED).step_seconds


def test_a_configured_offload_is_tried_beside_what_fits_without() -> None:
    """And is not the best: it moves parameters back and forth."""
    wanted = job(load([], [*LARGE, "lm.preset=370m", "cluster.workers=8", "parallel.cpu_offload=true"]))
    found = search(wanted, SPEED)
    assert found.best is not None
    assert not found.best.job.config.parallel.cpu_offload
    assert found.best.step_seconds < estimate(wanted, SPEED).step_seconds


@pytest.mark.parametrize("kind", ["rtx4090", "a100-40g", "h100"])
@pytest.mark.parametrize("preset", ["370m", "1.3b", "7b"])
def test_a_layout_that_fits_is_found_from_memory_alone_where_a_search_finds_one(preset: str, kind: str) -> None:
    words = [f"lm.preset={preset}", "cluster.workers=2", "train.global_batch=16", "train.precision=bf16"]
    wanted, speed = job(load([], [*words, "prepare.seq_len=2048"])), dataclasses.replace(SPEED, gpu=gpu(kind))
    assert (feasible(wanted, speed) is None) == (search(wanted, speed).best is None)


def test_a_plan_says_that_nothing_need_be_changed() -> None:
    few = [*LARGE, "lm.preset=370m", "cluster.workers=8", "parallel.activation_checkpointing=full"]
    found = plan(load([], few), "h100")
    assert not found.best_is_configured
    again = plan(load([], [*few, *overrides(found.best).split()]), "h100")
    assert again.best_is_configured
    # 0 for all workers is the same, and so is a chunk that holds everything.
    same = overrides(found.best).replace("parallel.shard=8", "parallel.shard=0")
    assert plan(load([], [*few, *same.split(), "parallel.loss_chunk=1000000"]), "h100").best_is_configured


def test_a_mesh_that_does_not_divide_the_gpus_is_no_obstacle() -> None:
    config, refused = on_gpus([RECIPE], [], 12)
    assert "parallel.shard is 8, which does not divide cluster.workers = 12" in refused
    found = plan(config, "h100", refused=refused)
    assert found.configured is None
    assert found.best.job.workers == 12
    assert refused in found.notes[0]
    assert on_gpus([RECIPE], [], 16)[1] == on_gpus([RECIPE], [])[1] == ""
    with pytest.raises(ConfigError, match=r"train\.global_batch 512"):
        on_gpus([RECIPE], [], 1000)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_the_console_plans_a_recipe_on_twelve_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ray-dwm", "plan", "--config", str(RECIPE), "--gpus", "12", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "parallel.shard is 8, which does not divide cluster.workers = 12" in out
    assert "as configured" not in out
    if words:
        assert json.loads(out)["configured"] is None


def test_an_elastic_group_stays_elastic() -> None:
    """It is planned at its largest, has room at its smallest, and is not sharded over a part of the workers."""
    config = load([], [*LARGE, "lm.preset=1.3b", "cluster.workers=[4, 64]", "train.global_batch=64"])
    found = plan(config, "h100")
    assert found.configured is not None
    assert found.configured.job.workers == found.best.job.workers == 64
    assert "cluster.workers=4,64" in overrides(found.best)
    assert load([], overrides(found.best).split()).cluster.workers == (4, 64)
    assert {x.config.parallel.shard for x in candidates(found.best.job, offload=False)} == {0, 1}
    smallest = found.best.job.smallest
    assert (smallest.workers, smallest.local_batch) == (4, 16)
    assert found.best.memory.total == run_peak(smallest).total > run_peak(found.best.job).total


def test_the_gpus_of_the_dwms_actor_are_paid_for() -> None:
    words = ["lm.preset=370m", "cluster.workers=8", "cluster.dwm_gpus=1"]
    found, without = (estimate(job(load([], [*words, *more])), SPEED) for more in ([], ["weighting.method=uniform"]))
    assert found.gpu_hours == pytest.approx(9 * found.hours)
    assert without.gpu_hours == pytest.approx(8 * without.hours)


def test_shorter_sequences_are_fewer_tokens(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "lm.seq_len=8", "train.steps=1000000")
    assert job(config).notes == (
        "lm.seq_len=8 uses the first 8 of 16 tokens of each sequence: 0.064 B tokens in train.steps=1000000, "
        "not 0.128 B",
    )
    assert job(tiny_config(shards, tmp_path)).notes == job(tiny_config(shards, tmp_path, "lm.seq_len=16")).notes == ()
    with pytest.raises(ConfigError, match=r"lm\.seq_len is 32, the shards in .* hold 16 tokens"):
        job(tiny_config(shards, tmp_path, "lm.seq_len=32"))


OFFLOADED = [*LARGE, "cluster.workers=2", "train.global_batch=16", "parallel.cpu_offload=true"]
SHARE = 13_015_864_320 / 2
"""Parameters of a rank."""


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ([], 4 + 3),  # parameter, gradient, two moments; a checkpoint's copy of all but the gradient
        (["checkpoint.asynchronous=false"], 4),
        (["train.optimizer=sgd", "checkpoint.asynchronous=false"], 2),
        (["parallel.cpu_offload=false"], 0),
    ],
)
def test_what_an_offloaded_rank_holds_in_its_host(words: list[str], numbers: int) -> None:
    waiting = 512 * 2**20 if numbers else 0
    wanted = job(load([], [*OFFLOADED, *words]))
    assert host_bytes(wanted, per_node=8) == 2 * (4 * numbers * SHARE + waiting)
    assert host_bytes(wanted, per_node=1) == 4 * numbers * SHARE + waiting


def test_offloading_needs_a_host_that_holds_it() -> None:
    """Two ranks hold 28 bytes of each of 13.0 B parameters, 364.4 GB, with what is read: of 455.6 GB and more."""
    config = load([], [*OFFLOADED, "parallel.cpu_offload=false"])
    assert HOST_USABLE == 0.8
    assert plan(config, "h100", host_memory_gb=458).best.job.config.parallel.cpu_offload
    with pytest.raises(ResourceError, match=r"needs 340\.4 GiB of each node's memory, .*--host-memory-gb"):
        plan(config, "h100", host_memory_gb=450)
