"""Oracle influences: as an optimizer made by hand gives them, and from what a run leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run
from synthetic import VOCAB, make_shards, tiny_config
from test_invariants import train
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.core.losses import token_losses
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import draw
from ray_dwm.engine.probe import Prober, _alone, checkpoint_path, open_prober
from ray_dwm.engine.saved import newest_step
from ray_dwm.errors import DataError, TrainingError
from ray_dwm.models.lm import Lm, build_lm, lm_config

TRAINED = 40
OPTIONS = (f"train.steps={TRAINED + 10}", "checkpoint.every=10", "checkpoint.keep=9", "weighting.method=uniform")


@pytest.fixture(scope="module")
def trained(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two workers, whose checkpoints are in two parts."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(shards, folder, *OPTIONS, "cluster.workers=2", "parallel.shard=2")
    run(2, folder / "p", train_and_describe, config)
    return config


def train_and_describe(config: RunConfig) -> None:
    """As the driver does, the configuration is left in the run folder."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    train(config)


def state_of(prober: Prober) -> list[torch.Tensor]:
    model, optimizer = get_state_dict(prober._lower.model, prober._lower.optimizer)
    flat = [*model.values(), *(x for state in optimizer["state"].values() for x in state.values())]
    return [whole(x) for x in flat]


def whole(tensor: Any) -> torch.Tensor:
    """A copy, not in parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def by_hand(prober: Prober, config: RunConfig, probes: np.ndarray, targets: dict[str, Path]) -> list[float]:
    """A copy of the LM for each probe, stepped by torch.optim.AdamW with the run's moments and learning rate."""
    weights, state = get_state_dict(prober._lower.model, prober._lower.optimizer)
    model = build_lm(lm_config("tiny", vocab_size=VOCAB, seq_len=16, eos_token_id=0), 0)
    model.load_state_dict({k: whole(v) for k, v in weights.items()})
    t = config.train
    moments = {
        k: {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in s.items()}
        for k, s in state["state"].items()
    }

    def target_loss(lm: Lm) -> float:
        losses = []
        for folder in targets.values():
            batch = draw(open_shards(str(folder)), 12, TRAINED, 5, 16, torch.device("cpu"))
            with torch.no_grad():
                losses.append(float(token_losses(lm_logits(lm, batch.input_ids), batch.input_ids).double().mean()))
        return float(np.mean(losses))

    before, found = target_loss(model), []
    for row in probes:
        lm = copy.deepcopy(model)
        named = dict(lm.named_parameters())
        groups = [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": t.weight_decay},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=prober._lower.lr(TRAINED), betas=(t.beta1, t.beta2), eps=t.eps)
        for name, p in named.items():
            optimizer.state[p] = {k: v.clone() for k, v in moments[name].items()}
        ids = torch.from_numpy(row.astype(np.int64))[None]
        token_losses(lm_logits(lm, ids), ids).mean().backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), t.clip_norm)
        optimizer.step()
        found.append(before - target_loss(lm))
    return found


def lm_logits(lm: Lm, ids: torch.Tensor) -> torch.Tensor:
    return lm.lm_head(lm.model(input_ids=ids).last_hidden_state)


def influences_and_oracle(config: RunConfig, targets: dict[str, Path]) -> dict[str, Any]:
    prober = Prober(config.run_dir, TRAINED)
    rows = open_shards(config.data.train).take(np.arange(5))
    before = state_of(prober)
    rates = [group["lr"] for group in prober._lower.optimizer.param_groups]
    found = prober.influences(rows, {k: str(v) for k, v in targets.items()}, sequences=12, seed=5)
    after = state_of(prober)
    parts = [prober.influences(rows, {k: str(v)}, sequences=12, seed=5) for k, v in targets.items()]
    weights = {"target": 3.0}
    weighed = prober.influences(rows, {k: str(v) for k, v in targets.items()}, 12, 5, weights)
    return {
        "weighed": weighed,
        "by weight": np.average(parts, axis=0, weights=[weights.get(name, 1.0) for name in targets]),
        "found": found,
        "again": prober.influences(rows, {k: str(v) for k, v in targets.items()}, sequences=12, seed=5),
        "oracle": by_hand(prober, config, rows.input_ids, targets),
        "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "rates": rates == [group["lr"] for group in prober._lower.optimizer.param_groups],
    }


@pytest.mark.parametrize("sets", [["target"], ["target", "held_out"]])
def test_influences_are_those_of_an_optimizer_made_by_hand(
    trained: RunConfig, shards: dict[str, Path], tmp_path: Path, sets: list[str]
) -> None:
    found = run(1, tmp_path / "p", influences_and_oracle, trained, {name: shards[name] for name in sets})
    np.testing.assert_allclose(found["found"], found["oracle"], atol=3e-6)
    assert np.std(found["oracle"]) > 1e-4, "the probes must differ for the comparison to say something"
    np.testing.assert_array_equal(found["found"], found["again"])
    np.testing.assert_allclose(found["weighed"], found["by weight"], atol=1e-9)
    assert found["same"] and found["rates"]


def influences_of(config: RunConfig, step: int, rows: np.ndarray, folder: str) -> np.ndarray:
    probes = open_shards(folder).take(rows)
    return open_prober(config.run_dir, step).influences(probes, {"target": config.data.target}, 32, seed=0)


def test_what_resembles_the_target_helps_more(trained: RunConfig, shards: dict[str, Path], tmp_path: Path) -> None:
    rows = np.arange(64)
    found = run(1, tmp_path / "p", influences_of, trained, 10, rows, str(shards["train"]))
    names = open_shards(str(shards["train"])).manifest.domain_names
    good = open_shards(str(shards["train"])).take(rows).domains == names.index("good")
    assert found[good].mean() > found[~good].mean() + 2 * found.std() / 8
    wins = (found[good][:, None] > found[~good][None]).mean()
    assert wins > 0.9


def test_an_lm_is_probed_alone_however_it_trains(shards: dict[str, Path], tmp_path: Path) -> None:
    options = ("train.precision=bf16", "parallel.compile=true", "parallel.shard=1", "weighting.method=dwm")
    run_config = tiny_config(shards, tmp_path, *OPTIONS, *options, "cluster.workers=[2,4]")
    alone = _alone(run_config)
    assert (alone.cluster.most_workers, alone.parallel.shard, alone.train.global_batch) == (1, 0, 1)
    assert not alone.learns_dwm and not alone.parallel.compile and not alone.data.target
    assert (alone.train.lr, alone.train.precision, alone.data.train) == (3e-3, "bf16", run_config.data.train)


def test_a_probe_of_which_nothing_counts_has_no_influence(trained: RunConfig, tmp_path: Path) -> None:
    make_shards(tmp_path / "masked", good=8, noise=8, masked=True, counted_from=12)
    reader = open_shards(str(tmp_path / "masked"))
    rows = reader.take(np.arange(16))
    assert rows.loss_mask is not None
    some = rows.loss_mask[:, 1:].any(axis=1)
    assert 0 < some.sum() < 16
    found = run(1, tmp_path / "p", influences_of, trained, 10, np.arange(16), str(tmp_path / "masked"))
    np.testing.assert_array_equal(np.isfinite(found), some)


def test_a_checkpoint_that_is_missing_or_damaged_is_one_line(trained: RunConfig, tmp_path: Path) -> None:
    assert newest_step(trained.run_dir) == TRAINED + 10
    assert newest_step(tmp_path) is None
    with pytest.raises(DataError, match=r"step_000000777 is not there any more"):
        open_prober(trained.run_dir, 777)
    part = next(checkpoint_path(trained.run_dir, 20).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    message = run(1, tmp_path / "p", message_of, trained.run_dir)
    assert "step_000000020 is damaged" in message and "\n" not in message
    assert checkpoint_path(trained.run_dir, 20).exists()


def message_of(run_dir: Path) -> str:
    with pytest.raises(TrainingError) as raised:
        Prober(run_dir, 20)
    return str(raised.value)
