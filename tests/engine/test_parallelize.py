"""Every layout of the LM computes what a plain one computes, with a DWM learnt beside it."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.gloo import run, run_all
from synthetic import tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from ray_dwm.config import RunConfig, load, to_dict
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.materialize import materialize, without_values
from ray_dwm.engine.mesh import Layout, init_mesh, shard
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.setup import build
from ray_dwm.errors import ConfigError
from ray_dwm.models.lm import Lm, build_lm, lm_config

COMPARED = {"loss": 1e-5, "grad_norm": 1e-4, "val/target/loss": 1e-5, "dwm/ess": 1e-4, "bilevel/realised_change": 1e-2}
"""Figure -> relative tolerance: sums in another order, amplified by Adam and, where losses are subtracted, by that."""
UNIFORM = ["weighting.method=uniform"]
LAYOUTS = {
    "plain": [],
    "full": ["parallel.activation_checkpointing=full"],
    "selective": ["parallel.activation_checkpointing=selective"],
    "unsharded": ["parallel.reshard_after_forward=false"],
    "chunks": ["parallel.loss_chunk=20"],
    "together": [
        "parallel.activation_checkpointing=full",
        "parallel.loss_chunk=12",
        "parallel.reshard_after_forward=false",
        "train.micro_batch=2",
    ],
}


def trained(config: RunConfig, layouts: dict[str, list[str]], world: int) -> dict[str, list[dict[str, float]]]:
    """Lines of metrics.jsonl of a run with each layout."""
    found = {}
    for name, options in layouts.items():
        own = load([], [*flat(config), f"name={name}-{world}", f"cluster.workers={world}", *options])
        own.run_dir.mkdir(parents=True, exist_ok=True)
        Trainer(build(own)).fit()
        found[name] = read_metrics(own.run_dir / "metrics.jsonl")
    return found


def flat(config: RunConfig) -> list[str]:
    """The configuration as overrides, but for what a layout names."""
    sections = to_dict(config)
    kept = {k: v for k, v in sections.items() if isinstance(v, dict) and k not in ("cluster", "parallel")}
    overrides = [
        f"{s}.{k}={text(v)}" for s, values in kept.items() for k, v in values.items() if not isinstance(v, dict)
    ]
    sets = [f"data.held_out.{k}={v}" for k, v in config.data.held_out.items()]
    return [*overrides, *sets, f"storage={config.storage}"]


def text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def assert_alike(found: dict[str, list[dict[str, float]]], expected: list[dict[str, float]]) -> None:
    for name, lines in found.items():
        assert len(lines) == len(expected)
        for line, right in zip(lines, expected, strict=True):
            # A checkpoint holds a step up when it has been written, which the clock decides.
            assert line.keys() ^ right.keys() <= {"checkpoint_seconds"}
            for key in COMPARED.keys() & line.keys():
                assert line[key] == pytest.approx(right[key], rel=COMPARED[key]), (name, line["step"], key)


ESTIMATORS = ("ghost_lowrank", "ghost", "one_sided")
HSDP = {"copies": ["parallel.shard=1"], "sharded": LAYOUTS["together"]}


@pytest.fixture(scope="module")
def layouts(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """`trained` by estimator and number of ranks."""
    folder, calls = tmp_path_factory.mktemp("layouts"), {}
    for estimator in ESTIMATORS:
        options = [f"bilevel.estimator={estimator}", "bilevel.fidelity_every=1", "dwm.lm_features=true"]
        options += ["bilevel.target_at=theta"] if estimator == "ghost" else []
        config = tiny_config(shards, folder / estimator, *options)
        tried = LAYOUTS if estimator == "ghost_lowrank" else {name: LAYOUTS[name] for name in ("plain", "together")}
        calls |= {(estimator, 1): (1, config, tried, 1), (estimator, 2): (2, config, HSDP, 2)}
        if estimator == "ghost_lowrank":
            calls[estimator, 4] = (4, config, {"2x2": ["parallel.shard=2"]}, 4)
    return run_all(folder, trained, calls)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_layout_changes_a_run(layouts: dict[Any, Any], estimator: str) -> None:
    plain = layouts[estimator, 1]["plain"]
    assert any("dwm/fidelity" in line for line in plain)
    for found in (found for (name, _), found in layouts.items() if name == estimator):
        assert_alike(found, plain)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_dwm(shards: dict[str, Path], tmp_path: Path) -> None:
    """The ghosts watch a step without the compiled code; all other steps run it."""
    config = tiny_config(shards, tmp_path, "train.steps=4", "train.eval_every=4", "checkpoint.every=4")
    torch._dynamo.reset()
    compiled = ["parallel.compile=true", "parallel.activation_checkpointing=full", "parallel.loss_chunk=64"]
    found = run(1, tmp_path / "run", trained, config, {"plain": [], "compiled": compiled}, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    assert any("dwm/fidelity" in line for line in found["compiled"])
    assert_alike(found, found["plain"])


def losses_of_shapes(options: list[str], shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Of forwards without gradients and with them, which go backward, too."""
    torch._dynamo.reset()
    ordinary = torch.compile
    torch.compile = functools.partial(ordinary, backend="eager")  # what is compiled how often, without the compiler
    config = load([], options).parallel
    model = parallelize(
        build_lm(lm_config("tiny", vocab_size=64, seq_len=16), 0, config.loss_chunk), init_mesh(), "fp32", config
    )
    torch.compile = ordinary
    found = []
    for shape in shapes:
        ids = torch.arange(shape[0] * shape[1]).view(shape) % 64
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                losses = model(ids).losses_bT
            found.append(losses.detach().clone())
            if gradients:
                losses.sum().backward()
    return found


@pytest.mark.slow
def test_compiled_code_takes_every_shape(tmp_path: Path) -> None:
    """Micro-batches, target batches and evaluation end in ragged ones, and so do the chunks of a sequence."""
    shapes = [(4, 16), (3, 16), (1, 16), (16, 16), (2, 16), (5, 16), (7, 16), (6, 16), (8, 16), (9, 16), (1, 8), (4, 8)]
    options = ["parallel.activation_checkpointing=full", "parallel.loss_chunk=20"]
    plain = run(1, tmp_path / "plain", losses_of_shapes, options, shapes)
    compiled = run(1, tmp_path / "compiled", losses_of_shapes, [*options, "parallel.compile=true"], shapes)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_offloaded_parameters_train_the_same(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "weighting.method=uniform")
    found = run(2, tmp_path / "run", trained, config, {"plain": [], "offload": ["parallel.cpu_offload=true"]}, 2)
    assert_alike(found, found["plain"])


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def calls(config: RunConfig) -> dict[str, int]:
    """Operators of one forward and backward."""
    model = build_lm(lm_config("tiny", vocab_size=64, seq_len=16), 0, config.parallel.loss_chunk)
    parallelize(model, init_mesh(), "fp32", config.parallel)
    with Calls() as seen:
        model(torch.zeros(4, 16, dtype=torch.long)).losses_bT.sum().backward()
    return dict(seen.counts)


def test_what_checkpointing_computes_again(tmp_path: Path) -> None:
    """2 blocks of 7 products, an attention and a silu, and the head; a product's backward takes two more.

    A block's last product is not needed again.
    """
    products, attentions, silus = "mm", "_scaled_dot_product_flash_attention_for_cpu", "silu"
    for mode, again in (("none", (0, 0, 0)), ("selective", (0, 0, 2)), ("full", (2 * 6, 2, 2))):
        found = run(1, tmp_path / mode, calls, load([], [f"parallel.activation_checkpointing={mode}"]))
        expected = (3 * (2 * 7 + 1) + again[0], 2 + again[1], 2 + again[2])
        assert (found[products], found[attentions], found[silus]) == expected, mode
    found = run(1, tmp_path / "chunks", calls, load([], ["parallel.loss_chunk=16"]))
    assert found[products] == 3 * 2 * 7 + 4 * 4, "4 chunks of 4 tokens of 4 sequences, each with one product more"


def places() -> tuple[list[str], float, float]:
    """How the parameters lie in a mesh of 2 x 2, and norm and inner product over a copy."""
    mesh = init_mesh(2)
    model: Lm = parallelize(build_lm(lm_config("tiny", vocab_size=64, seq_len=16), 0), mesh, "fp32", load().parallel)
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) and p.placements == (Replicate(), Shard(0)) for p in parameters)
    local, layout = [shard(p.detach()) for p in parameters], Layout(mesh)
    return list(mesh.mesh_dim_names or ()), layout.norm(local), layout.dot(local, local)


def test_a_mesh_of_copies_counts_every_parameter_once(tmp_path: Path) -> None:
    names, norm, dot = run(4, tmp_path, places)
    model = build_lm(lm_config("tiny", vocab_size=64, seq_len=16), 0)
    expected = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    assert names == ["dp_replicate", "dp_shard"]
    assert norm == pytest.approx(expected**0.5, rel=1e-6)
    assert dot == pytest.approx(expected, rel=1e-5)


def as_built_whole(preset: str, shard: int, offload: bool) -> tuple[bool, bool, bool]:
    """Whether a sharded LM has the weights of a whole one, takes no memory before, and is tied as the whole one."""
    llama, config = (
        lm_config(preset, vocab_size=64, seq_len=16),
        load([], [f"parallel.cpu_offload={offload}", *UNIFORM]),
    )
    whole = build_lm(llama, 3)
    model, fillings = without_values(lambda: Lm(llama))
    empty = all(p.is_meta for p in model.parameters() if p.dim() > 1)
    parallelize(model, init_mesh(shard), "fp32", config.parallel)
    materialize(model, fillings, 3, torch.device("cpu"))
    expected = dict(whole.named_parameters())
    found = {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    alike = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(32).view(2, 16)
    alike = alike and torch.equal(model(ids).losses_bT, whole(ids).losses_bT)
    return alike, empty, (model.lm_head.weight is model.model.embed_tokens.weight) == llama.tie_word_embeddings


MESHES = [
    (1, "tiny", 0, False),
    (2, "tiny", 0, True),
    (2, "30m", 0, False),
    (3, "tiny", 0, False),
    (4, "tiny", 2, False),
]
"""Ranks, preset, parallel.shard, parallel.cpu_offload."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """`as_built_whole` by the row of MESHES."""
    return run_all(tmp_path_factory.mktemp("meshes"), as_built_whole, {mesh: mesh for mesh in MESHES})


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_weights_are_those_of_the_whole_lm_for_every_mesh(built: dict[Any, Any], mesh: Any) -> None:
    assert built[mesh] == (True, True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["parallel.shard=3", "cluster.workers=4"], "parallel.shard is 3, which does not divide cluster.workers = 4"),
        (["parallel.cpu_offload=true"], "parallel.cpu_offload keeps the parameters away"),
        (["parallel.loss_chunk=-1"], "parallel.loss_chunk is -1: it must not be negative"),
        (["parallel.activation_checkpointing=some"], "must be one of none, selective, full"),
    ],
)
def test_layouts_that_cannot_be_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([], options)
