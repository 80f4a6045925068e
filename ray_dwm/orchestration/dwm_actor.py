"""The DWM actor (its inside: dwm_service.py), and its clients in the workers.

The actor may die at any time. It holds nothing that cannot be remade: an update is a pure function of the
last state and the feedback, rank 0 keeps both until the version has arrived everywhere, and gives them to a
restarted actor. A `life` number ties all calls of one worker-group attempt together, so that what an earlier
attempt left in the queue is ignored.
"""

from __future__ import annotations

import time
from typing import Any

import ray
import torch
import torch.distributed as dist

from ray_dwm.config import RunConfig
from ray_dwm.data.records import digest
from ray_dwm.engine.learner import DwmLearner, Feedback, State
from ray_dwm.engine.mesh import all_sum, device, is_main
from ray_dwm.errors import ResourceError, TrainingError
from ray_dwm.orchestration.cluster import NAMESPACE, actor_cpus
from ray_dwm.orchestration.dwm_service import DwmService, Reply

FETCH_TIMEOUT_S = 600.0
_TRY_S = 2.0
_NAME_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 60.0
_RESTARTING = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError)


def actor_name(config: RunConfig) -> str:
    """The actor's name in the cluster, of this run folder alone: cells of an experiment share their runs' names."""
    return f"dwm-{config.name}-{digest(str(config.run_dir))[:8]}"


def create_actor(config: RunConfig, learner: DwmLearner) -> Any:
    """Create the run's actor (before the worker group, so that its resources are taken first).

    Raises:
        ResourceError: another job of the cluster is training this run.
    """
    options = {
        "name": actor_name(config),
        "namespace": NAMESPACE,
        "max_restarts": -1,
        "max_task_retries": -1,
        "num_cpus": actor_cpus(config),
        "num_gpus": config.cluster.dwm_gpus,
        "scheduling_strategy": "DEFAULT",  # a sweep's trial lies in a placement group that holds its driver alone
    }
    deadline = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            return ray.remote(DwmService).options(**options).remote(learner, config.name)
        except ValueError as error:
            # The name is taken. The actor of a killed driver goes within seconds, and must not be reused.
            if "already taken" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the cluster has an actor {actor_name(config)} already: another job trains {config.run_dir}, "
                    "wait for it or choose another name=..."
                ) from None
            time.sleep(0.5)


class RemoteWeightService:
    """A WeightService over the actor. `restore` and `fetch` are collective."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._main = is_main()
        life = torch.tensor(time.time_ns() if self._main else 0, device=device())
        self._life = int(all_sum(life))
        self._last: State | None = None
        self._pending: list[Feedback] = []

    def restore(self, state: State) -> None:
        """See WeightService."""
        self._last, self._pending = state, []
        if self._main:
            try:
                ray.get(self._actor.restore.remote(self._life, state), timeout=FETCH_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                raise TrainingError(
                    f"the DWM actor did not start within {FETCH_TIMEOUT_S:g} s: look at its log in the Ray dashboard; "
                    "the last checkpoint is intact"
                ) from None

    @property
    def queue(self) -> int:
        """Updates that have been sent and are not fetched; known on rank 0."""
        return len(self._pending)

    def submit(self, feedback: Feedback) -> None:
        """See WeightService."""
        if self._main:
            self._pending.append(feedback)
            self._actor.update.remote(self._life, feedback)

    def fetch(self, version: int) -> State:
        """See WeightService. All ranks leave together, or repair the actor and try again together."""
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        state: State | None = None
        while time.monotonic() < deadline:
            if state is None:
                state = self._try_fetch(version)
            have = torch.tensor(0 if state is None else 1, device=device())
            if int(all_sum(have)) == dist.get_world_size() and state is not None:
                self._last = state
                self._pending = [feedback for feedback in self._pending if feedback.version > version]
                return state
            if state is not None:
                self._repair(version, state)
        raise TrainingError(
            f"the DWM actor did not deliver version {version} within {FETCH_TIMEOUT_S:g} s: look at its log in the Ray "
            "dashboard; the last checkpoint is intact"
        )

    def _try_fetch(self, version: int) -> State | None:
        deadline = time.monotonic() + _TRY_S
        while time.monotonic() < deadline:
            try:
                reply = self._ask(version)
                if reply.error is not None:
                    raise reply.error
                if reply.state is not None:
                    # Copied: the store's memory is read-only and goes with the actor.
                    return {k: v.clone() for k, v in ray.get(reply.state[0]).items()}
                if not reply.known_life:
                    self._revive()
            except _RESTARTING:
                pass
            time.sleep(0.01)
        return None

    def _ask(self, version: int) -> Reply:
        reply: Reply = ray.get(self._actor.fetch.remote(self._life, version), timeout=_CALL_TIMEOUT_S)
        return reply

    def _revive(self) -> None:
        """Give a restarted actor the last state and all feedback since; only rank 0 holds them."""
        if self._main and self._last is not None:
            self._actor.restore.remote(self._life, self._last)
            for feedback in self._pending:
                self._actor.update.remote(self._life, feedback)

    def _repair(self, version: int, state: State) -> None:
        """This rank has the version and another has not: see that a restarted actor publishes it again."""
        if not self._main:
            time.sleep(0.05)
            return
        try:
            reply = self._ask(version)
        except _RESTARTING:
            return
        if not reply.known_life:
            self._last = state
            self._pending = [feedback for feedback in self._pending if feedback.version > version]
            self._revive()
