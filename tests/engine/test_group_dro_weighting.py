"""Group DRO in real runs: against plain forwards of both LMs, what it prefers, and what must not change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run
from safetensors.torch import load_file, save_file
from synthetic import make_shards, tiny_config
from test_baselines import fitted, twin_of
from test_invariants import train

from ray_dwm.config import RunConfig
from ray_dwm.core.losses import token_losses
from ray_dwm.data.manifest import load_manifest
from ray_dwm.engine.batch import to_batch
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.export import export_lm
from ray_dwm.engine.group_dro import GroupDroWeighting
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.messages import MESSAGES
from ray_dwm.engine.setup import build
from ray_dwm.errors import TrainingError, UserError
from ray_dwm.models.hf import load_lm

DRO = "weighting.method=group_dro"


def exported(config: RunConfig, steps: int) -> None:
    """Train and write hf/; with 0 steps, the LM as it begins."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build(config)
    if steps:
        Trainer(parts).fit()
    export_lm(parts, check_data(config))


@pytest.fixture(scope="module")
def lms(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LM folders: `learnt` knows the domain good, `fresh` is what every run begins with."""
    root = tmp_path_factory.mktemp("lms")
    for name, steps in (("learnt", 150), ("fresh", 0)):
        options = ["weighting.method=uniform", f"train.steps={max(steps, 1)}", "checkpoint.every=1000", f"name={name}"]
        run(1, root / "p", exported, tiny_config(shards, root, *options, "train.eval_every=1000"), steps)
    return {name: root / name for name in ("learnt", "fresh")}


def over(lm: Path, *options: str) -> list[str]:
    return [DRO, f"weighting.group_dro.reference={lm}", *options]


def last(found: dict[str, Any], column: str) -> dict[str, float]:
    return {name: found["lines"][-1][f"group_dro/{column}/{name}"] for name in ("good", "noise")}


@torch.no_grad()
def beside_plain_forwards(config: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights of some steps, and the same by a few lines from plain forwards of both LMs."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts, pairs, alpha = build(config), [], torch.tensor([0.5, 0.5], dtype=torch.float64)
    options, excess = config.weighting.group_dro, torch.zeros(2, dtype=torch.float64)
    share = torch.tensor([d.rows for d in load_manifest(config.data.train).domains.values()]) / 256
    for step, rows in enumerate(parts.source.stream(0, 5)):
        batch = to_batch(rows, 8, parts.seq_len, parts.device)
        losses = token_losses(twin_of(parts)(input_ids=batch.input_ids).logits, batch.input_ids)
        if options.reference:
            losses = (losses - load_lm(Path(options.reference))(batch.input_ids).losses_bT).clamp(min=0)
        counts = torch.zeros(2)
        for d in (0, 1):
            of_d = batch.mask & (batch.domains == d)[:, None]
            counts[d] = of_d.sum()
            if counts[d]:
                excess[d] = losses[of_d].mean()
        alpha = alpha * (options.eta * excess).exp()
        alpha = (1 - options.smoothing) * alpha / alpha.sum() + options.smoothing / 2
        expected = (alpha / (1 - (1 - share) ** 8) / counts)[batch.domains]
        assert parts.weighting is not None
        parts.weighting.advance(step)
        with torch.enable_grad():
            result = parts.lower.step(step, batch, parts.weighting)
        parts.lower.zero_grad()
        pairs.append((result.weights_B, (expected / expected.sum()).float()))
    return pairs


@pytest.mark.parametrize("extra", [[], ["train.micro_batch=3"], ["lm.seq_len=12"], ["weighting.group_dro.eta=0.3"]])
@pytest.mark.parametrize("raw", [False, True])
def test_weights_equal_those_of_plain_forwards(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path, extra: list[str], raw: bool
) -> None:
    config = tiny_config(shards, tmp_path, *([DRO] if raw else over(lms["learnt"])), *extra)
    for weights, expected in run(1, tmp_path / "p", beside_plain_forwards, config):
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro", [8, 3])
def test_an_lm_has_no_excess_over_itself(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path, precision: str, micro: int
) -> None:
    options = over(lms["fresh"], "train.steps=1", f"train.precision={precision}", f"train.micro_batch={micro}")
    found = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *options))
    assert set(last(found, "excess").values()) == {0.0}
    assert last(found, "alpha") == {"good": 0.5, "noise": 0.5}


@pytest.mark.slow
def test_noise_gains_by_its_loss_but_not_by_its_excess(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path
) -> None:
    """The property for which DoReMi has a reference: plain Group DRO puts all on what cannot be learnt."""
    options = ["train.steps=80", "weighting.group_dro.eta=0.1", "train.eval_every=1000"]
    excess = run(1, tmp_path / "a", fitted, tiny_config(shards, tmp_path, *over(lms["learnt"], *options), "name=a"))
    raw = run(1, tmp_path / "b", fitted, tiny_config(shards, tmp_path, DRO, *options, "name=b"))
    assert last(excess, "average")["noise"] < 0.3 < 0.7 < last(raw, "average")["noise"]
    assert last(excess, "average")["good"] + last(excess, "average")["noise"] == pytest.approx(1)
    early, late = excess["lines"][1], excess["lines"][-1]
    # What the reference has learnt and the proxy not yet is what gains, and its excess then shrinks.
    assert early["group_dro/excess/good"] > 2 > 10 * early["group_dro/excess/noise"]
    assert late["group_dro/excess/good"] < 0.5 * early["group_dro/excess/good"]
    assert early["group_dro/alpha/good"] > 0.5 > early["group_dro/alpha/noise"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "changes"), [(3, []), (1, ["train.micro_batch=3"]), (2, ["train.micro_batch=2"])])
def test_world_and_accumulation_do_not_change_the_weights(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path, world: int, changes: list[str]
) -> None:
    base = over(lms["learnt"], "train.optimizer=sgd", "train.lr=0.1")
    reference = run(1, tmp_path / "a", fitted, tiny_config(shards, tmp_path / "a", *base))
    config = tiny_config(shards, tmp_path / "b", *base, *changes, f"cluster.workers={world}")
    other = run(world, tmp_path / "b", fitted, config)
    assert torch.equal(reference["sample_id"], other["sample_id"])
    torch.testing.assert_close(reference["weight"] / 8, other["weight"] / 8, atol=1e-5, rtol=0)
    assert last(other, "average") == pytest.approx(last(reference, "average"), abs=1e-5)


def states(config: RunConfig) -> bool:
    """Whether all ranks hold the same state to the last bit."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build(config)
    Trainer(parts).fit()
    assert isinstance(parts.weighting, GroupDroWeighting)
    flat = torch.cat([x.double().flatten() for x in parts.weighting.state_dict(0).values()])
    gathered = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, flat)
    return all(torch.equal(flat, x) for x in gathered)


@pytest.mark.slow
def test_all_ranks_agree_exactly(shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path) -> None:
    assert run(3, tmp_path / "p", states, tiny_config(shards, tmp_path, *over(lms["learnt"]), "cluster.workers=3"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path, world: int
) -> None:
    options = over(lms["learnt"], f"cluster.workers={world}", "train.steps=8", "checkpoint.every=3")
    whole = run(world, tmp_path / "a", train, tiny_config(shards, tmp_path / "a", *options))
    stopped = tiny_config(shards, tmp_path / "b", *options)
    run(world, tmp_path / "b1", train, stopped, 5)
    resumed = run(world, tmp_path / "b2", train, stopped)
    assert whole["lines"] == resumed["lines"]
    assert len({line["group_dro/average/good"] for line in whole["lines"][1:]}) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole["theta"], resumed["theta"], strict=True))


@pytest.mark.slow
def test_another_number_of_workers_continues_the_game(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path
) -> None:
    base = over(lms["learnt"], "train.optimizer=sgd", "train.lr=0.1", "train.steps=8", "checkpoint.every=3")
    whole = run(1, tmp_path / "a", train, tiny_config(shards, tmp_path / "a", *base))
    run(1, tmp_path / "b1", train, tiny_config(shards, tmp_path / "b", *base), 5)
    resumed = run(2, tmp_path / "b2", train, tiny_config(shards, tmp_path / "b", *base, "cluster.workers=2"))
    for column in ("alpha", "average", "excess"):
        assert last(resumed, column) == pytest.approx(last(whole, column), abs=1e-5)


def test_fixed_weights_stay_as_they_are(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ["weighting.group_dro.eta=0", "weighting.group_dro.smoothing=0"]
    options += ["weighting.group_dro.initial.good=3", "weighting.group_dro.initial.noise=1"]
    found = run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, DRO, *options))
    assert last(found, "alpha") == pytest.approx({"good": 0.75, "noise": 0.25}, abs=1e-12)
    assert last(found, "average") == pytest.approx({"good": 0.75, "noise": 0.25}, abs=1e-12)


def test_a_collapse_is_warned_of_and_then_ends_the_run(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, DRO, "train.steps=80", "weighting.group_dro.smoothing=1e-6")
    with pytest.raises(TrainingError, match=r"at step .* noise has had nearly all for 21 steps in a row") as raised:
        run(1, tmp_path / "p", fitted, config)
    assert "lower weighting.group_dro.eta" in str(raised.value) and "\n" not in str(raised.value)
    warned = (config.run_dir / MESSAGES).read_text()
    assert warned.count("below weighting.group_dro.min_entropy = 0.05") == 1


def test_a_domain_that_is_rarer_than_a_batch_is_told(tmp_path: Path, shards: dict[str, Path]) -> None:
    make_shards(tmp_path / "rare", good=252, noise=4)
    config = tiny_config({**shards, "train": tmp_path / "rare"}, tmp_path, DRO, "weighting.group_dro.eta=0.01")
    found = run(1, tmp_path / "p", fitted, config)
    assert "less than one sequence of noise on average" in (config.run_dir / MESSAGES).read_text()
    seen = ["group_dro/excess/noise" in line for line in found["lines"][1:]]
    assert seen == sorted(seen), "once a domain was seen it keeps its excess"


def spoilt(lm: Path, folder: Path, case: str) -> Path:
    """A copy of an LM that does not fit."""
    folder.mkdir()
    config = (lm / "hf" / "config.json").read_text()
    state = load_file(lm / "hf" / "model.safetensors")
    if case == "nan":
        state["model.norm.weight"] *= float("nan")
    if case == "missing":
        del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if case == "vocabulary":
        config = config.replace('"vocab_size": 64', '"vocab_size": 32')
    if case == "context":
        config = config.replace('"max_position_embeddings": 16', '"max_position_embeddings": 8')
    if case == "kind":
        config = config.replace('"model_type": "llama"', '"model_type": "gpt2"')
    (folder / "config.json").write_text("{" if case == "damaged" else config)
    if case == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("kind", "is of type gpt2"),
        ("vocabulary", "has vocab_size = 32"),
        ("context", "has max_position_embeddings = 8"),
        ("tokenizer", "was trained with another tokenizer"),
        ("damaged", "config.json is damaged"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path, case: str, message: str
) -> None:
    folder = spoilt(lms["fresh"], tmp_path / "lm", case)
    with pytest.raises(UserError, match=message) as raised:
        check_data(tiny_config(shards, tmp_path, *over(folder)))
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_a_reference_without_all_its_weights_is_refused(
    shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path
) -> None:
    folder = spoilt(lms["fresh"], tmp_path / "lm", "missing")
    with pytest.raises(UserError, match=r"cannot be loaded as an LM \(model.norm.weight is missing\)"):
        run(1, tmp_path / "p", fitted, tiny_config(shards, tmp_path, *over(folder)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["weighting.group_dro.reference=nowhere"], "nowhere is neither a finished run nor a Hugging Face folder"),
        (["weighting.group_dro.initial.good=1"], "initial: noise has no weight, the domains are good, noise"),
        (["weighting.group_dro.initial.web=1"], "initial: good has no weight"),
        (
            [f"weighting.group_dro.initial.{name}=1" for name in ("good", "noise", "web")],
            "initial: web is no domain of",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    shards: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_data(tiny_config(shards, tmp_path, DRO, *options))
    assert "\n" not in str(raised.value)


def test_a_single_domain_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has one domain, good"):
        check_data(tiny_config({**shards, "train": shards["target"]}, tmp_path, DRO))


def step_of_a_spoilt_lm(config: RunConfig) -> None:
    parts = build(config)
    with torch.no_grad():
        parts.lower.parameters[-1].fill_(float("nan"))
    rows = next(iter(parts.source.stream(0, 1)))
    parts.lower.step(0, to_batch(rows, 8, parts.seq_len, parts.device), parts.weighting)


def test_losses_that_are_not_finite_say_whose(shards: dict[str, Path], lms: dict[str, Path], tmp_path: Path) -> None:
    spoiled = spoilt(lms["fresh"], tmp_path / "lm", "nan")
    with pytest.raises(TrainingError, match=r"the loss of weighting.group_dro.reference=.* is not finite at step 0"):
        run(1, tmp_path / "a", fitted, tiny_config(shards, tmp_path, *over(spoiled)))
    with pytest.raises(TrainingError, match="the LM's loss is not finite at step 0: it has diverged"):
        run(1, tmp_path / "b", step_of_a_spoilt_lm, tiny_config(shards, tmp_path, *over(lms["learnt"])))
