"""Every metric that a run exports: the one table behind the exports, docs/monitoring.md, and what lints the rules.

Ray puts `ray_` before a name, and adds labels of its own (SessionName, NodeAddress, WorkerId ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN, RUN_ID, RANK = "ray_train_run_name", "ray_train_run_id", "ray_train_worker_world_rank"
"""Ray Train's own tags, so that its panels and ours are about the same run."""

Place = Literal["rank 0", "worker", "actor", "driver"]
PLACE_TAGS: dict[Place, tuple[str, ...]] = {
    "rank 0": (RUN, RUN_ID, RANK),
    "worker": (RUN, RUN_ID, RANK),
    "actor": (RUN,),
    "driver": (RUN,),
}


@dataclass(frozen=True, slots=True)
class Series:
    """One metric."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str
    key: str = ""
    """Of rank 0's: the key of metrics.jsonl that it shows; `{tag}` stands for a tag's value."""
    place: Place = "rank 0"
    """The process that exports it."""
    tags: tuple[str, ...] = ()
    """Besides those of its place."""
    only: str = ""
    """Where not every run that learns a DWM has it: which ones do."""

    @property
    def all_tags(self) -> tuple[str, ...]:
        """Its tags."""
        return PLACE_TAGS[self.place] + self.tags

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}"


def _gauge(name: str, unit: str, help: str, key: str = "", only: str = "", tags: tuple[str, ...] = ()) -> Series:
    return Series(name, "gauge", unit, help, key, tags=tags, only=only)


def _counter(name: str, unit: str, help: str, key: str, only: str = "", tags: tuple[str, ...] = ()) -> Series:
    return Series(name, "counter", unit, help, key, tags=tags, only=only)


SERIES = (
    _gauge("lm_step", "steps", "Steps that are done", "step"),
    _gauge("lm_step_timestamp_seconds", "Unix time", "When the last step was logged", "timestamp"),
    _counter("lm_tokens_total", "tokens", "Trained on, with those that a restart repeats", "new_tokens"),
    _gauge("lm_loss", "nats/token", "Mean loss of the step's batch, before weighting", "loss"),
    _gauge(
        "lm_eval_loss",
        "nats/token",
        "Loss on an evaluation set; set=target: the target",
        "val/{set}/loss",
        "",
        ("set",),
    ),
    _gauge("lm_learning_rate", "1", "Learning rate", "lr"),
    _gauge("lm_grad_norm", "1", "Gradient norm before clipping", "grad_norm"),
    _gauge("lm_tokens_per_second", "tokens/s", "Speed of the last step, all workers", "tokens_per_s"),
    _gauge("lm_tflops", "TFLOP/s", "Model FLOPs of a worker", "tflops"),
    _gauge("lm_mfu", "1", "The same over the dense peak of the GPU", "mfu", "known GPUs"),
    _counter(
        "lm_phase_seconds_total",
        "s",
        "Time of rank 0 by phase; phase=data: waiting for data",
        "seconds/{phase}",
        "",
        ("phase",),
    ),
    _counter("lm_checkpoint_seconds_total", "s", "For which checkpoints held up training", "checkpoint_seconds"),
    _gauge(
        "lm_checkpoint_timestamp_seconds", "Unix time", "Of the newest checkpoint; of the start where there is none"
    ),
    _gauge("lm_restarts", "starts", "Starts of the worker group on this run folder before this one"),
    _counter(
        "lm_not_finite_total",
        "figures",
        "Logged as NaN or infinite; they are not exported",
        "not_finite",
        "runs with such",
    ),
    _gauge(
        "dwm_ess_fraction",
        "1",
        "Effective sample size of the weights: 0 one sequence has all, 1 uniform",
        "ess_fraction",
    ),
    _gauge("dwm_weight_entropy", "1", "Entropy of the weights over log B", "dwm/entropy"),
    _gauge(
        "dwm_domain_weight",
        "1",
        "Mean relative weight of a domain in the last batch that had it; 1: uniform",
        "weight/{domain}",
        "",
        ("domain",),
    ),
    _gauge("dwm_overhead_fraction", "1", "Time that plain training does not have, over the rest", "dwm/overhead_frac"),
    _gauge("dwm_version", "versions", "The DWM version in use", "dwm/version"),
    _gauge(
        "dwm_weights_staleness_steps", "steps", "LM steps since that version's bi-level step", "dwm/staleness_steps"
    ),
    _gauge("dwm_stage", "stages", "Stages that have begun", "dwm/stage", "bilevel.stages"),
    _gauge("dwm_hypergrad_norm", "1", "Norm of dJ/dphi before clipping", "dwm/hypergrad_norm"),
    _gauge("dwm_kl", "nats", "KL of the weights to uniform ones at the last update", "dwm/kl"),
    _gauge(
        "dwm_fidelity", "1", "Cosine of the alignments with a better estimator's, at the last check", "dwm/fidelity"
    ),
    _gauge("dwm_actor_queue", "updates", "Sent to the actor and not fetched yet", "queue"),
    Series("dwm_update_seconds", "gauge", "s", "Duration of the actor's last update", place="actor"),
    Series("dwm_actor_version", "gauge", "versions", "The newest version that the actor has made", place="actor"),
    Series("dwm_actor_memory_bytes", "gauge", "bytes", "Resident memory of the actor", place="actor"),
    Series("lm_worker_memory_bytes", "gauge", "bytes", "Resident memory of a worker", place="worker"),
    Series(
        "lm_worker_gpu_memory_bytes",
        "gauge",
        "bytes",
        "Peak of PyTorch's memory on its GPU",
        place="worker",
        only="GPUs",
    ),
    Series("lm_run_active", "gauge", "1", "1 while the command trains or waits for workers", place="driver"),
    Series(
        "lm_failures_total",
        "counter",
        "runs",
        "Runs that ended in failure; kind: not_finite, collapsed, other",
        place="driver",
        tags=("kind",),
        only="failed runs",
    ),
)

RAY_SERIES = frozenset(
    {"ray_data_iter_total_blocked_seconds", "ray_train_controller_state", "ray_node_mem_used", "ray_node_mem_total"}
)
"""Of Ray's own, those that the dashboard shows beside ours."""

BY_NAME = {series.name: series for series in SERIES}


def markdown_table() -> str:
    """The table of docs/monitoring.md."""
    lines = ["| metric | kind | unit | what | from | tags besides the run's | only |", "|---|---|---|---|---|---|---|"]
    for s in SERIES:
        tags = ", ".join(f"`{tag}`" for tag in s.tags)
        lines.append(f"| `{s.exported}` | {s.kind} | {s.unit} | {s.help} | {s.place} | {tags} | {s.only} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
