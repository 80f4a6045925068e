"""A rank's replica of the DWM: weights over the GLOBAL batch, and the versions that are in flight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.schedules import BilevelSchedule, EveryN, Staged
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.budget import first_every
from ray_dwm.engine.controls import dwm_weights, learnt_alignments
from ray_dwm.engine.learner import METRICS, Feedback, State, WeightService
from ray_dwm.engine.mesh import all_gather_rows
from ray_dwm.engine.weighting import Statistics
from ray_dwm.models.dwm import DataWeightingModel, DwmShape


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Scores and weights of a batch that is yet to come."""

    scores_B: Tensor
    weights_B: Tensor


class Weigher:
    """Applies DWM version v at exactly the step that the schedule names, however long the actor takes."""

    def __init__(
        self,
        config: RunConfig,
        model: DataWeightingModel,
        start: State,
        service: WeightService,
        device: torch.device,
    ) -> None:
        self._config, self._service = config, service
        self.schedule = schedule(config)
        self._model = model.to(device).eval()
        # State of every version from the one that the last step used to the newest: what a checkpoint must hold.
        self._versions: dict[int, State] = {0: start}
        self._step = 0
        self._applied = 0
        self._now: _Ahead | None = None
        self._ahead: _Ahead | None = None
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._apply(0)
        self._metrics = self._version_metrics()
        service.restore(start)

    @property
    def statistics(self) -> Statistics:
        """See Weighting."""
        return "loss_and_entropy" if self._config.dwm.lm_features else "none"

    @property
    def slots(self) -> int:
        """The most versions that can be in flight at once, the one in use included."""
        return self.schedule.delay_steps // self.schedule.closest + 2

    def advance(self, step: int) -> None:
        """Swap in the version that LM step `step` uses, waiting for it if it is late."""
        self._step = step
        self._now, self._ahead = self._ahead, None
        self._swap(step)
        self._metrics = self._version_metrics()

    def prepare(self, input_ids_bT: Tensor, upcoming_bT: Tensor) -> None:
        """Weigh the next LM step's batch already: on a GPU beside the LM's step, on a stream of its own.

        The next step's version is used, so an actor needs one more `dwm.delay_steps` to have as much time as without.

        Args:
            input_ids_bT: this step's sequences, weighed now where the step before it has not done so.
            upcoming_bT: the next step's.
        """
        if self._now is None:
            self._now = _Ahead(*self._weigh(self._step, input_ids_bT, None))
        self._swap(self._step + 1)
        if self._stream is None:
            self._ahead = _Ahead(*self._weigh(self._step + 1, upcoming_bT, None))
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._ahead = _Ahead(*self._weigh(self._step + 1, upcoming_bT, None))

    def _swap(self, step: int) -> None:
        """Apply the version of LM step `step`; that of the step in progress is kept, however far ahead that is."""
        version = self.schedule.version(step)
        if version != self._applied:
            self._collect(version)
            self._apply(version)
        for old in [v for v in self._versions if v < self.version]:
            del self._versions[old]

    def _collect(self, newest: int) -> None:
        for version in range(max(self._versions) + 1, newest + 1):
            self._versions[version] = self._service.fetch(version)

    def _apply(self, version: int) -> None:
        self._model.load_state_dict(_parameters(self._versions[version]))
        self._applied = version

    @property
    def version(self) -> int:
        """The version that the last LM step used; with `dwm.look_ahead` the next one may be applied already."""
        return self.schedule.version(self._step)

    @property
    def shape(self) -> DwmShape:
        """The DWM's architecture."""
        return self._model.shape

    def parameters(self) -> State:
        """Parameters of `version`, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in _parameters(self._versions[self.version]).items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The version that weighed this step's batch, and figures of the update that made it."""
        return self._metrics

    def _version_metrics(self) -> dict[str, float]:
        update = zip(METRICS, self._versions[self.version]["metrics"].tolist(), strict=True)
        figures = {"dwm/version": self.version, "dwm/staleness_steps": self.schedule.staleness(self._step)}
        if isinstance(self.schedule, Staged):
            figures["dwm/stage"] = self.schedule.stage(self._step)
        return {**figures, **{f"dwm/{name}": value for name, value in update}}

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting; the scores are the DWM's own, whatever a null control makes of its weights."""
        if self._now is None:
            return self._weigh(self._step, batch.input_ids, statistics_bS)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            for tensor in (self._now.scores_B, self._now.weights_B):
                tensor.record_stream(torch.cuda.current_stream())
        return self._now.scores_B, self._now.weights_B

    @torch.no_grad()
    def _weigh(self, step: int, input_ids_bT: Tensor, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        scores_B = batch_scores(self._model, input_ids_bT, statistics_bS, self._config.train.global_batch)
        return scores_B, dwm_weights(self._config, scores_B, step)

    def submit(
        self,
        step: int,
        input_ids_bT: Tensor,
        alignments_C: Tensor,
        positions_C: Tensor,
        statistics_bS: Tensor | None,
    ) -> None:
        """Send the feedback of a bi-level step upwards: alignments of some places in the global batch."""
        control, seed, size = self._config.dwm.control, self._config.seed, self._config.train.global_batch
        self._service.submit(
            Feedback(
                version=self.schedule.updates_before(step + 1),
                input_ids=all_gather_rows(input_ids_bT)[:size].cpu(),
                alignments=learnt_alignments(control, alignments_C, seed, step).cpu(),
                positions=positions_C.cpu(),
                statistics=None if statistics_bS is None else all_gather_rows(statistics_bS)[:size].cpu(),
            )
        )

    def state_dict(self, step: int) -> State:
        """State for a checkpoint after `step` LM steps: waits for the newest version, keeps all in flight.

        Slot j holds version newest - j, or the oldest in flight where there are fewer.
        """
        newest = self.schedule.updates_before(step)
        self._collect(newest)
        oldest = min(self._versions)
        return {
            f"{slot}.{key}": value.clone()  # slots may hold the same version, and loading writes in place
            for slot in range(self.slots)
            for key, value in self._versions[max(newest - slot, oldest)].items()
        }

    def load_state_dict(self, step: int, state: State) -> None:
        """Continue after `step` LM steps: roll the service back and apply the version in force."""
        self._versions, self._ahead = {}, None
        for slot in range(self.slots):
            prefix = f"{slot}."
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self._versions[int(part["counters"][0])] = part
        self._service.restore(self._versions[self.schedule.updates_before(step)])
        self._step = max(0, step - 1)
        self._apply(self.schedule.version(step))
        self._versions = {v: s for v, s in self._versions.items() if v >= self.version}


def _parameters(state: State) -> State:
    """The DWM's parameters in the learner's state."""
    return {key.removeprefix("phi."): value for key, value in state.items() if key.startswith("phi.")}


def batch_scores(model: DataWeightingModel, input_ids_bT: Tensor, statistics_bS: Tensor | None, size: int) -> Tensor:
    """Scores of the global batch, (size,): every rank encodes its own sequences, the joint head sees all of them."""
    encoded_BE = all_gather_rows(model.encode(input_ids_bT))[:size]
    statistics_BS = None if statistics_bS is None else all_gather_rows(statistics_bS)[:size]
    return model.scores(encoded_BE, statistics_BS)


def schedule(config: RunConfig) -> BilevelSchedule:
    """The bi-level schedule of a run."""
    bilevel, delay = config.bilevel, config.dwm.delay_steps
    if bilevel.stages:
        return Staged(
            stages=bilevel.stages,
            updates=bilevel.stage_updates,
            total_steps=config.train.steps,
            warmup_steps=bilevel.warmup_steps,
            delay_steps=delay,
            hold=bilevel.stage_lm == "hold",
        )
    return EveryN(
        every=first_every(config),
        warmup_steps=bilevel.warmup_steps,
        delay_steps=delay,
        changing=bilevel.every == 0,
    )
