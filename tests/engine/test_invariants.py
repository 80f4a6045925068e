"""What must not change the result: worlds, accumulation, restarts, and a DWM that is still uniform."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from gloo import run, run_all
from synthetic import tiny_config
from transformers import LlamaForCausalLM

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.checks import check_data, read_plan
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.saved import list_checkpoints, step_of
from ray_dwm.engine.setup import build
from ray_dwm.models.lm import build_lm, lm_config

TIMES = ("seconds/", "bilevel_seconds/", "step_seconds/", "checkpoint_seconds", "tokens_per_s", "tflops")
TIMES += ("time_s", "dwm/overhead_frac")


def train(config: RunConfig, stop_at: int = 0) -> dict[str, Any]:
    """Parameters and figures of a run in this process group; `stop_at` ends it early, without a farewell."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build(config)
    trainer = Trainer(parts)
    if stop_at:
        step = trainer._train_step

        def failing(index: int, *batches: Any) -> Any:
            if index == stop_at:
                raise KeyboardInterrupt
            return step(index, *batches)

        trainer._train_step = failing  # type: ignore[method-assign]
        try:
            trainer.fit()
        except KeyboardInterrupt:
            return {}
    trainer.fit()
    parameters = [p.full_tensor().detach().clone() for p in parts.lower.model.parameters()]  # type: ignore[attr-defined]
    phi = [] if parts.weigher is None else list(parts.weigher.parameters().values())
    lines = [
        {k: v for k, v in line.items() if not k.startswith(TIMES)}
        for line in read_metrics(config.run_dir / "metrics.jsonl")
    ]
    return {"theta": parameters, "phi": phi, "lines": lines}


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest entry."""
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(left, right, strict=True))


def plain_training(config: RunConfig) -> list[torch.Tensor]:
    """An independent few-line loop: the token mean of each global batch, clip, AdamW. No DWM, no FSDP."""
    manifest = check_data(config)
    llama = lm_config(config.lm.preset, vocab_size=manifest.vocab_size, seq_len=16, eos_token_id=0)
    model, c = LlamaForCausalLM(llama), config.train
    model.load_state_dict(build_lm(llama, config.seed).state_dict())
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    plan, reader = read_plan(config, manifest), open_shards(config.data.train)
    for step in range(c.steps):
        ids = torch.from_numpy(reader.take(plan.rows(step)).input_ids.astype("int64"))
        logits = model(input_ids=ids).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        (losses.sum() / losses.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * min(1.0, (step + 1) / c.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("weighting", ["off", "uniform_dwm"])
def test_uniform_weights_are_plain_training_bit_for_bit(
    shards: dict[str, Path], tmp_path: Path, weighting: str
) -> None:
    extra = ["weighting.method=uniform"] if weighting == "off" else ["dwm.delay_steps=10"]  # beyond the last step
    config = tiny_config(shards, tmp_path, "train.schedule=constant", "train.clip_norm=0.5", *extra)
    ours = run(1, tmp_path / "ours", train, config)
    for a, b in zip(ours["theta"], plain_training(config), strict=True):
        assert torch.equal(a, b)


CUTS = [(1,), (2,), (1, "train.micro_batch=3"), (2, "train.micro_batch=2"), (5, "train.micro_batch=1")]
"""Ranks and overrides; the first is not cut."""


@pytest.fixture(scope="module")
def cut(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The run by the row of CUTS."""
    folder, calls = tmp_path_factory.mktemp("cuts"), {}
    for row, (world, *changes) in enumerate(CUTS):
        config = tiny_config(shards, folder / str(row), "dwm.lr=1e-3", "bilevel.epsilon=0.1", *changes)
        calls[CUTS[row]] = (world, config)
    return run_all(folder, train, calls)


@pytest.mark.parametrize("case", CUTS[1:], ids=str)
def test_world_and_accumulation_do_not_change_the_run(cut: dict[Any, Any], case: tuple[Any, ...]) -> None:
    reference, other = cut[CUTS[0]], cut[case]
    assert distance(reference["theta"], other["theta"]) < 2e-3  # Adam amplifies rounding of small gradients
    for left, right in zip(reference["lines"], other["lines"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5) if "loss" in left else True
    first = next(line for line in reference["lines"] if line.get("dwm/version") == 1)
    same = next(line for line in other["lines"] if line.get("dwm/version") == 1)
    assert first["dwm/hypergrad_norm"] == pytest.approx(same["dwm/hypergrad_norm"], rel=1e-3)


UNEVEN = [
    ("bilevel.estimator=ghost_lowrank",),
    ("bilevel.estimator=central", "bilevel.epsilon=0.1", "train.micro_batch=2"),
    ("bilevel.fraction=0.5", "dwm.lm_features=true", "train.micro_batch=2"),
]


@pytest.fixture(scope="module")
def uneven(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The run by the number of ranks and the row of UNEVEN, with the table of its weights."""
    base = ["bilevel.kl=0.3", "train.steps=8", "bilevel.every=1", "bilevel.target_batch=10"]
    base += ["train.eps=1e-4"]  # Adam amplifies rounding of small gradients; the DWM's still does
    folder, calls = tmp_path_factory.mktemp("uneven"), {}
    for world, row in itertools.product((1, 3), range(len(UNEVEN))):
        config = tiny_config(shards, folder / f"{world}-{row}", *base, *UNEVEN[row])
        calls[world, UNEVEN[row]] = (world, config)
    found = run_all(folder, train, calls)
    return {k: {**found[k], "weights": pq.read_table(config.run_dir / "weights")} for k, (_, config) in calls.items()}


@pytest.mark.parametrize("options", UNEVEN, ids=" ".join)
def test_a_world_that_does_not_divide_the_batch_does_not_change_the_run(
    uneven: dict[Any, Any], options: tuple[str, ...]
) -> None:
    """Three ranks of 3 + 3 + 2 sequences, and target batches of 10; the last rank's padding must leave no trace."""
    one, three = uneven[1, options], uneven[3, options]
    assert len(one["lines"]) == len(three["lines"]) == 9
    for left, right in zip(one["lines"], three["lines"], strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() & {"loss", "val/target/loss", "val/test/loss"}:
            assert left[key] == pytest.approx(right[key], rel=1e-5), key
        for key in left.keys() & {"dwm/alignment_scale", "dwm/fidelity", "bilevel/predicted_change"}:
            assert left[key] == pytest.approx(right[key], rel=1e-4), key
    assert one["lines"][-1]["dwm/ess"] < 7.5, "the DWM must have learnt something"
    for name in ("step", "sample_id", "domain"):
        assert one["weights"][name].equals(three["weights"][name])
    for name, tolerance in (("loss", 1e-4), ("weight", 2e-2)):
        columns = (torch.tensor(found["weights"][name].to_pylist()) for found in (one, three))
        torch.testing.assert_close(*columns, rtol=0, atol=tolerance)
    assert distance(one["theta"], three["theta"]) < 1e-3


RESUMED: list[tuple[int, int, list[str]]] = [
    (1, 5, ["dwm.delay_steps=0", "bilevel.every=1"]),
    (2, 5, ["dwm.delay_steps=3", "bilevel.every=1"]),
    (1, 2, ["bilevel.every=1"]),  # before the first checkpoint
    (2, 7, ["dwm.delay_steps=2", "bilevel.every=3", "dwm.lm_features=true", "train.micro_batch=2"]),
    (1, 5, ["weighting.method=uniform"]),
    (2, 5, ["bilevel.every=1", "bilevel.reuse=3", "bilevel.fraction=0.5"]),
    (1, 4, ["bilevel.stages=2", "bilevel.stage_updates=2", "bilevel.stage_lm=hold"]),
]
RESUMED_SLOWLY: list[tuple[int, int, list[str]]] = [
    (1, 5, ["weighting.method=loss", "weighting.r_warmup_steps=3", "weighting.r_anneal_steps=4"]),
    (2, 5, ["weighting.method=joint_update_aware", "weighting.anchor_every=2", "weighting.anchor_sequences=16"]),
    (1, 5, ["dwm.delay_steps=1", "bilevel.every=1"]),
    (1, 5, ["train.optimizer=sgd", "train.momentum=0.9"]),
    (1, 5, ["bilevel.every=1", "bilevel.reuse=3", "data.more_targets.other={target}"]),
    (1, 5, ["bilevel.every=1", "bilevel.estimator=ghost", "bilevel.target_at=theta"]),
    (2, 5, ["bilevel.every=1", "dwm.look_ahead=true", "dwm.delay_steps=2"]),
    (1, 5, ["dwm.control=random", "bilevel.every=1"]),
    (2, 5, ["dwm.control=shuffled", "bilevel.every=1"]),
    (1, 5, ["dwm.control=shuffled_target", "bilevel.every=1"]),
]
"""Ranks, the step in which the run is cut, and overrides."""


@pytest.mark.parametrize(
    ("world", "stop_at", "changes"),
    [*RESUMED, *(pytest.param(*row, marks=pytest.mark.slow) for row in RESUMED_SLOWLY)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(
    shards: dict[str, Path], tmp_path: Path, world: int, stop_at: int, changes: list[str]
) -> None:
    options = [f"cluster.workers={world}", "train.steps=8", "checkpoint.every=3"]
    options += [change.format(**shards) for change in changes]
    config = tiny_config(shards, tmp_path / "whole", *options)
    stopped = tiny_config(shards, tmp_path / "stopped", *options)
    calls = {"whole": (world, config), "stopped": (world, stopped, stop_at)}
    whole = run_all(tmp_path / "before", train, calls)["whole"]
    steps = [step_of(path) for path in list_checkpoints(stopped.run_dir / "checkpoints")]
    assert steps == list(range(3, stop_at + 1, 3))
    again = run(world, tmp_path / "after", train, stopped)  # of several ranks: in processes that have not seen the run
    assert whole["lines"] == again["lines"]
    assert any(line.get("dwm/version", 0) > 0 for line in whole["lines"]) == (config.weighting.method == "dwm")
    for a, b in zip(whole["theta"] + whole["phi"], again["theta"] + again["phi"], strict=True):
        assert torch.equal(a, b)


EXTRAS = [(), ("dwm.control=random",), ("bilevel.stages=2", "bilevel.stage_updates=2")]


@pytest.fixture(scope="module")
def weighed(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The run by the row of EXTRAS and whether it weighs ahead."""
    folder, calls = tmp_path_factory.mktemp("weighed"), {}
    for row, ahead in itertools.product(range(len(EXTRAS)), (False, True)):
        options = ["train.steps=8", "bilevel.every=1", "cluster.workers=2", f"dwm.look_ahead={ahead}", *EXTRAS[row]]
        calls[EXTRAS[row], ahead] = (2, tiny_config(shards, folder / f"{row}-{ahead}", *options))
    return run_all(folder, train, calls)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS, ids=" ".join)
def test_weighing_ahead_changes_nothing(weighed: dict[Any, Any], extra: tuple[str, ...]) -> None:
    plain, other = weighed[extra, False], weighed[extra, True]
    assert plain["lines"] == other["lines"]
    assert all(torch.equal(a, b) for a, b in zip(plain["theta"], other["theta"], strict=True))
