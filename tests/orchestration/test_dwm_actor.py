"""The actor's inside without Ray, and the client's side against a real actor that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from orchestration.conftest import PATIENCE_S, wait_for
from synthetic import VOCAB, tiny_config

from ray_dwm.config import BilevelConfig, DwmConfig
from ray_dwm.engine.learner import DwmLearner, Feedback, State
from ray_dwm.models.dwm import dwm_shape
from ray_dwm.orchestration.dwm_actor import RemoteWeightService, create_actor
from ray_dwm.orchestration.dwm_service import DwmService


class InProcess(DwmService):
    """Publishes without an object store."""

    def _publish(self, state: State) -> State:
        return state


def learner() -> DwmLearner:
    return DwmLearner(dwm_shape("xs", VOCAB), DwmConfig(), BilevelConfig(), seed=0)


def feedback(version: int) -> Feedback:
    generator = torch.Generator().manual_seed(version)
    ids = torch.randint(VOCAB, (8, 16), generator=generator)
    return Feedback(version, ids, torch.randn(8, generator=generator), torch.arange(8), None)


def expected(version: int) -> State:
    """The state that uninterrupted learning reaches."""
    reference = learner()
    for number in range(1, version + 1):
        reference.update(feedback(number))
    return reference.state()


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_service_publishes_versions_in_order() -> None:
    service = InProcess(learner())
    service.restore(7, learner().state())
    assert service.fetch(7, 1).state is None
    for version in (1, 2):
        service.update(7, feedback(version))
    reply = service.fetch(7, 2).state
    assert reply is not None
    assert_same(reply[0], expected(2))


@pytest.mark.parametrize(("life", "version"), [(6, 1), (7, 2), (7, 0)])
def test_service_ignores_another_life_and_another_turn(life: int, version: int) -> None:
    service = InProcess(learner())
    service.restore(7, learner().state())
    service.update(life, feedback(version))
    assert service.fetch(7, 1).state is None
    assert service.fetch(7, 2).state is None


def test_service_without_a_life_asks_to_be_restored() -> None:
    assert not InProcess(learner()).fetch(7, 0).known_life


def test_rolling_back_makes_the_same_versions_again() -> None:
    service = InProcess(learner())
    service.restore(1, learner().state())
    for version in (1, 2, 3):
        service.update(1, feedback(version))
    service.restore(2, expected(1))
    for version in (2, 3):
        service.update(2, feedback(version))
    reply = service.fetch(2, 3).state
    assert reply is not None
    assert_same(reply[0], expected(3))


@pytest.fixture
def actor(driver: None, shards: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    """A real actor and a process group of one."""
    config = tiny_config(shards, tmp_path, f"name=actor-{tmp_path.name}")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    actor = create_actor(config, learner())
    yield actor
    ray.kill(actor)
    dist.destroy_process_group()


def test_killed_actor_is_remade_from_the_last_state_and_the_feedback_since(actor: Any) -> None:
    service = RemoteWeightService(actor)
    service.restore(learner().state())
    service.submit(feedback(1))
    assert_same(service.fetch(1), expected(1))
    wait_for(lambda: _pids(actor), "the list of actors, which lags behind,")
    (pid,) = _pids(actor)
    process = psutil.Process(pid)
    service.submit(feedback(2))
    process.kill()
    process.wait(PATIENCE_S)
    service.submit(feedback(3))
    assert_same(service.fetch(2), expected(2))
    assert_same(service.fetch(3), expected(3))


def _pids(actor: Any) -> list[int]:
    return [found["pid"] for found in _actors() if found["actor_id"] == actor._actor_id.hex()]


def _actors() -> list[dict[str, Any]]:
    from ray.util.state import list_actors

    return [actor.__dict__ for actor in list_actors(filters=[("state", "=", "ALIVE")])]
