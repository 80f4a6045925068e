"""Files, overrides and types of the configuration."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ray_dwm.config import RunConfig, load, to_yaml
from ray_dwm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_need_no_file() -> None:
    assert load() == RunConfig()


def test_overrides_win_over_files_and_files_over_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train:\n  steps: 7\n  lr: 1e-4\ndata:\n  held_out:\n    books: x\n")
    second.write_text("train:\n  steps: 8\ndata:\n  held_out:\n    code: y\n")
    config = load([first, second], ["train.steps=1_000", "dwm.lm_features=on", "data.held_out.code=z"])
    assert (config.train.steps, config.train.lr, config.dwm.lm_features) == (1000, 1e-4, True)
    assert config.data.held_out == {"books": "x", "code": "z"}
    left_out = load([first], ["train.steps=100", "data.held_out.books=", "data.held_out.code=y"])
    assert left_out.data.held_out == {"code": "y"}


@pytest.mark.parametrize(
    ("overrides", "targets", "held_out"),
    [
        ([], {}, {}),
        (["data.held_out.law=l"], {}, {"law": "l"}),
        (
            ["data.target=t", "data.more_targets.code=c", "data.held_out.law=l"],
            {"target": "t", "code": "c"},
            {"law": "l"},
        ),
    ],
)
def test_what_is_minimised_and_what_is_evaluated(
    overrides: list[str], targets: dict[str, str], held_out: dict[str, str]
) -> None:
    data = load([], overrides).data
    assert data.target_sets == targets
    assert data.evaluation_sets == targets | held_out


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    config = load([file])
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load([copy]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  stps: 3\n", r"unknown configuration key train.stps: did you mean train.steps\?"),
        ("dsir:\n  features: tokens\n", r"unknown configuration key dsir: did you mean selection.dsir\?"),
        ("global_batch: 8\n", r"unknown configuration key global_batch: did you mean train.global_batch\?"),
        ("train: 3\n", "train is a section"),
        ("train:\n  steps: [1, 2]\n", "it must be a single value"),
        ("train:\n  steps: 3.5\n", "it must be of type int"),
        ("train:\n  steps: inf\n", "it must be of type int"),
        ("train:\n  precision: fp8\n", "one of fp32, bf16"),
        ("- a\n- b\n", "must hold a mapping"),
        ("train: {\n", "cannot be read"),
        ("data:\n  held_out: x\n", "must be a mapping"),
        ("dwm:\n  floor: 1.0\n", "must lie in"),
        ("dwm:\n  control: permuted\n", "one of none, random, shuffled, shuffled_target"),
        ("weighting:\n  method: dsir\n", "one of dwm, uniform, loss, joint_update_aware"),
        ("weighting:\n  strategy: mid\n", "one of linupper, quadratic, extremes"),
        ("weighting:\n  r: 0\n", "weighting.r is 0.0: it must be greater than 0"),
        ("weighting:\n  r_warmup_steps: -1\n", "weighting.r_warmup_steps is -1: it must not be negative"),
        ("weighting:\n  r_anneal_steps: -1\n", "weighting.r_anneal_steps is -1: it must not be negative"),
        ("weighting:\n  beta: -0.1\n", "weighting.beta is -0.1: it must not be negative"),
        ("weighting:\n  tau: 0\n", "weighting.tau is 0.0: it must be greater than 0"),
        ("weighting:\n  anchor_every: 0\n", "weighting.anchor_every is 0: it must be greater than 0"),
        ("weighting:\n  anchor_sequences: 0\n", "weighting.anchor_sequences is 0: it must be greater than 0"),
        ("train:\n  global_batch: 6\nbilevel:\n  fraction: 0.25\n", "bilevel.fraction is 0.25: .* one of 1, 0.5, 0.33"),
        ("train:\n  global_batch: 1\ncluster:\n  workers: 1\n", "train.global_batch is 1: a DWM weighs"),
        ("train:\n  global_batch: 2\ncluster:\n  workers: 3\n", "cluster.workers is 3, train.global_batch 2"),
        ("cluster:\n  workers: [2, 1]\n", r"cluster.workers is \[2, 1\]: the first number is the least"),
        ("cluster:\n  workers: 0\n", "cluster.workers is 0: it must be greater than 0"),
        ("cluster:\n  workers: [0, 2]\n", "cluster.workers is 0: it must be greater than 0"),
        ("cluster:\n  workers: [1, 2, 3]\n", "cluster.workers is .*: it must be one value or 2"),
        ("cluster:\n  workers: [1, two]\n", "cluster.workers is 'two': it must be of type int"),
        ("cluster:\n  workers: [1, 2]\nparallel:\n  shard: 2\n", "elastic, and parallel.shard = 2"),
        ("cluster:\n  workers: [1, 2]\n  cpus_per_worker: 0.5\n", "cluster.cpus_per_worker is 0.5: .* whole"),
        ("cluster:\n  workers: [1, 2]\n  dwm_gpus: 0.5\n", "cluster.dwm_gpus is 0.5: .* elastic"),
        ("bilevel:\n  warmup_steps: 0\n", "hypergradient is noise"),
        (
            "weighting:\n  method: uniform\ndata:\n  selection: mates\nbilevel:\n  target_weights: {target: 0}\n",
            "bilevel.target_weights are all 0",
        ),
        ("selection:\n  seed: -2\n", "selection.seed is -2"),
        ("name: a/b\n", "use letters, digits"),
    ],
)
def test_wrong_files_are_refused_with_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load([file])
    assert "\n" not in str(raised.value)


def test_an_override_cannot_replace_a_section(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  steps: 3\n")
    with pytest.raises(ConfigError, match="command line: train is a section"):
        load([file], ["train=3"])


@pytest.mark.parametrize(
    ("overrides", "draw", "label"),
    [
        ([], ("bilevel.target_batch", 8), "DWM"),
        (["dwm.control=random"], ("bilevel.target_batch", 8), "DWM (random)"),
        (["weighting.method=uniform", "bilevel.target_batch=3"], None, "uniform"),
        (["weighting.method=loss", "weighting.anchor_sequences=3", "dwm.control=random"], None, "loss"),
        (["weighting.method=joint_update_aware"], ("weighting.anchor_sequences", 32), "joint_update_aware"),
    ],
)
def test_what_the_method_decides(overrides: list[str], draw: tuple[str, int] | None, label: str) -> None:
    config = load([], overrides)
    assert (config.target_draw, config.weighting_label) == (draw, label)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a line")))
    assert (type(error), str(error), error.exit_code) == (ConfigError, "a line", 2)


@pytest.mark.parametrize("size", ["370m", "1.3b"])
def test_recipes_have_30_billion_tokens_and_both_schedules(size: str) -> None:
    """Half a million to a million tokens a batch, the budget met to a batch, every N steps or in five stages."""
    every_n = load([ROOT / "configs" / f"{size}.yaml"])
    tokens = every_n.train.global_batch * every_n.prepare.seq_len
    assert 0.5e6 <= tokens <= 1.05e6
    assert 0 <= every_n.train.steps * tokens - 30e9 < tokens
    assert (every_n.bilevel.every, every_n.bilevel.stages) == (10, 0)
    staged = load([ROOT / "configs" / f"{size}.yaml", ROOT / "configs" / "5-stages.yaml"])
    assert staged.bilevel.stages == 5
    assert staged.train == every_n.train


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("30_000", 30_000), ("3e4", 30_000), ("1.5e3", 1500)])
def test_whole_numbers(text: str, number: int) -> None:
    assert load([], [f"selection.budget={text}"]).selection.budget == number
