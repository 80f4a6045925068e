"""The DWM actor's inside: the learner, and its versions in the object store.

Apart from its clients (dwm_actor.py), because a run waits for the actor's process, which imports this and no more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ray_dwm.engine.learner import DwmLearner, Feedback, State
from ray_dwm.errors import DwmError, TrainingError
from ray_dwm.orchestration.exporting import Exporter, resident_bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What the actor answers to `fetch`."""

    known_life: bool
    """False: the actor has restarted and must be restored."""
    state: list[Any] | None = None
    """[reference to the state], once the version exists."""
    error: DwmError | None = None


class DwmService:
    """The actor's inside: a plain class, tested without Ray."""

    def __init__(self, learner: DwmLearner, run: str = "") -> None:
        """
        Args:
            run: what its metrics are tagged with.
        """
        torch.set_num_threads(1)
        self._exporter = Exporter("actor", run)
        self._learner = learner
        self._life: int | None = None
        self._published: dict[int, Any] = {}
        self._error: DwmError | None = None

    def restore(self, life: int, state: State) -> None:
        """Begin a life at a state; what was published before is dropped."""
        self._life, self._error = life, None
        self._learner.load_state(state)
        self._published = {self._learner.version: self._publish(state)}
        self._export()

    def update(self, life: int, feedback: Feedback) -> None:
        """Make and publish the next version; feedback of another life or out of turn is ignored."""
        if life != self._life or feedback.version != self._learner.version + 1 or self._error is not None:
            return
        try:
            start = time.perf_counter()
            self._published[feedback.version] = self._publish(self._learner.update(feedback))
            self._exporter.put("dwm_update_seconds", time.perf_counter() - start)
            self._export()
        except DwmError as error:
            self._error = error
        except Exception as error:  # nobody waits for this call's result: the next fetch has to tell
            self._error = TrainingError(f"DWM version {feedback.version} failed: {type(error).__name__}: {error}")

    def fetch(self, life: int, version: int) -> Reply:
        """A version, and room is made by dropping older ones."""
        if life != self._life:
            return Reply(known_life=False)
        if self._error is not None:
            return Reply(known_life=True, error=self._error)
        for old in [v for v in self._published if v < version - 1]:
            del self._published[old]
        reference = self._published.get(version)
        return Reply(known_life=True, state=None if reference is None else [reference])

    def _export(self) -> None:
        self._exporter.put("dwm_actor_version", self._learner.version)
        self._exporter.put("dwm_actor_memory_bytes", resident_bytes())

    def _publish(self, state: State) -> Any:
        return ray.put(state)
