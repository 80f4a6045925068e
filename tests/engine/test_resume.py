"""A run that is stopped continues: on another number of workers, on another mesh, and after a SIGTERM or a warning."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from gloo import run, run_all
from synthetic import tiny_config
from test_invariants import TIMES, train

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.engine import loop
from ray_dwm.engine.checks import check_checkpoint, check_data
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.saved import list_checkpoints, step_of
from ray_dwm.engine.setup import build
from ray_dwm.errors import ConfigError, Stopped

STEPS, CUT = 10, 7  # the run is cut in step 7; its newest checkpoint is of step 6
OPTIONS = (f"train.steps={STEPS}", "train.micro_batch=4", "train.lr=1e-3", "checkpoint.every=3")


def layout(world: int, shard: int) -> tuple[str, ...]:
    return (f"cluster.workers={world}", f"parallel.shard={shard}")


@pytest.fixture(scope="module")
def undisturbed(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One worker, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    found: dict[str, Any] = run(1, folder / "p", train, tiny_config(shards, folder, *OPTIONS, *layout(1, 0)))
    return found


LAYOUTS = [
    ((1, 0), (2, 0)),
    ((2, 0), (1, 0)),
    ((2, 0), (4, 0)),
    ((2, 1), (2, 0)),  # two copies of the LM, then one in two parts
    ((4, 2), (2, 1)),  # two copies in two parts each, then two whole ones
]
"""Ranks and parallel.shard, before and after."""


@pytest.fixture(scope="module")
def continued(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The continued run by the row of LAYOUTS."""
    folder, first, then = tmp_path_factory.mktemp("layouts"), {}, {}
    for row, (before, after) in enumerate(LAYOUTS):
        storage = folder / str(row)
        first[row] = (before[0], tiny_config(shards, storage, *OPTIONS, *layout(*before)), CUT)
        then[before, after] = (after[0], tiny_config(shards, storage, *OPTIONS, *layout(*after)))
    run_all(folder / "before", train, first)
    for _, config, _ in first.values():
        assert step_of(list_checkpoints(config.run_dir / "checkpoints")[-1]) == 6
    return run_all(folder / "after", train, then)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_another_number_of_workers_or_another_mesh_continues_the_curve(
    undisturbed: dict[str, Any], continued: dict[Any, Any], case: Any
) -> None:
    found = continued[case]
    assert [line["step"] for line in found["lines"]] == list(range(STEPS + 1))
    assert found["lines"][-1]["dwm/version"] > found["lines"][6]["dwm/version"] > 0
    for whole, resumed in zip(undisturbed["lines"], found["lines"], strict=True):
        for key in ("loss", "val/target/loss", "val/test/loss"):
            assert (key in whole) == (key in resumed)
            if key in whole:
                assert resumed[key] == pytest.approx(whole[key], rel=1e-5), (whole["step"], key)


def lines_of(config: RunConfig) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(TIMES)}
        for line in read_metrics(config.run_dir / "metrics.jsonl")
    ]


def terminated(config: RunConfig, at: int, victim: int) -> str:
    """A run of whose processes one gets a SIGTERM in the step after `at`; every rank must hear of it and end."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(build(config))
    step = trainer._train_step

    def signalled(index: int, *batches: Any) -> Any:
        if index == at and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(index, *batches)

    trainer._train_step = signalled  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as raised:
        trainer.fit()
    assert signal.getsignal(signal.SIGTERM) == before
    return str(raised.value)


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 1)])
def test_sigterm_to_one_process_saves_and_ends_all_and_leaves_no_trace(
    shards: dict[str, Path], tmp_path: Path, world: int, victim: int
) -> None:
    options = ("train.steps=8", "checkpoint.every=100", f"cluster.workers={world}")
    whole = tiny_config(shards, tmp_path / "a", *options)
    run(world, tmp_path / "p0", train, whole)
    config = tiny_config(shards, tmp_path / "b", *options)
    message = run(world, tmp_path / "p1", terminated, config, 4, victim)
    assert message == f"[{config.name}] stopped at step 5: checkpoint saved, the same command continues"
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")] == ["step_000000005"]
    run(world, tmp_path / "p2", train, config)
    assert lines_of(config) == lines_of(whole)


def told_before(config: RunConfig, victim: int) -> str:
    """A run that a rank is asked to end before its first step."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with pytest.raises(Stopped) as raised:
        Trainer(build(config, should_stop=lambda: dist.get_rank() == victim)).fit()
    return str(raised.value)


def test_a_run_that_is_stopped_before_its_first_step_takes_none(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "cluster.workers=2", "weighting.method=uniform")
    message = run(2, tmp_path / "p", told_before, config, 0)
    assert message == f"[{config.name}] stopped at step 0, before the next: the same command continues"
    assert (config.run_dir / "metrics.jsonl").read_text() == ""
    assert list_checkpoints(config.run_dir / "checkpoints") == []


def warned(config: RunConfig, interval: float, at: int) -> list[tuple[int, bool]]:
    """Checkpoints that were told, in a run that is warned at the look number `at`."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    looks, told = 0, []

    def preempted() -> bool:
        nonlocal looks
        looks += 1
        return looks == at

    def on_checkpoint(step: int, path: Path, figures: dict[str, float]) -> None:
        told.append((step, path.is_dir()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "NOTICE_INTERVAL_S", interval)
        Trainer(build(config, preempted=preempted, on_checkpoint=on_checkpoint)).fit()
    return told


WARNINGS = {
    (0.0, 4): [(4, True), (6, True)],
    (1000.0, 1): [(1, True), (6, True)],
    (1000.0, 2): [(6, True)],
}
"""Seconds between two looks, the look that finds a warning -> checkpoints that are told."""


@pytest.fixture(scope="module")
def heeded(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """`warned` by the row of WARNINGS."""
    folder, calls = tmp_path_factory.mktemp("warnings"), {}
    for interval, at in WARNINGS:
        config = tiny_config(shards, folder / f"{interval}-{at}", "checkpoint.every=100", "cluster.workers=2")
        calls[interval, at] = (2, config, interval, at)
    return run_all(folder, warned, calls)


@pytest.mark.parametrize("case", WARNINGS, ids=str)
def test_a_warning_saves_a_checkpoint_and_training_goes_on(heeded: dict[Any, Any], case: tuple[float, int]) -> None:
    assert heeded[case] == WARNINGS[case]


def saved_and_checked(config: RunConfig, other: RunConfig) -> str:
    train(config)
    manifest = check_data(config)
    check_checkpoint(config, manifest)
    with pytest.raises(ConfigError) as raised:
        check_checkpoint(other, manifest)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_the_driver_refuses_a_checkpoint_of_another_run_before_anything_starts(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    config, other = tiny_config(shards, tmp_path), tiny_config(shards, tmp_path, "lm.preset=quickstart")
    message = run(1, tmp_path / "p", saved_and_checked, config, other)
    assert "step_000000006 is of another run (lm.width is 32 there and 96 here)" in message


def in_parts(config: RunConfig, ends: list[int]) -> list[dict[str, float]]:
    """A run that is trained up to one step after the other; each part ends with a checkpoint."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for end in ends:
        Trainer(build(config, until=end, figures={6: {"told": 0.5}})).fit()
        assert step_of(list_checkpoints(config.run_dir / "checkpoints")[-1]) == end
    return lines_of(config)


@pytest.mark.parametrize(
    "extra", [(), pytest.param(("dwm.look_ahead=true", "dwm.delay_steps=2"), marks=pytest.mark.slow)]
)
def test_a_run_in_parts_is_the_same_run(shards: dict[str, Path], tmp_path: Path, extra: tuple[str, ...]) -> None:
    whole = tiny_config(shards, tmp_path, *OPTIONS, *extra, "name=whole")
    parts = tiny_config(shards, tmp_path, *OPTIONS, *extra, "name=parts")
    expected = run(1, tmp_path / "p", train, whole)["lines"]
    found = run(1, tmp_path / "p", in_parts, parts, [5, 7, STEPS])
    assert found[6].pop("told") == 0.5
    assert found == expected
