"""A sweep's file: what it means, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_dwm.config.space import Domain
from ray_dwm.config.tune import default_of, load_tune, probes, scale_config, with_values
from ray_dwm.errors import ConfigError

SWEEP = """
name: x
config: configs/quickstart.yaml
set: {train: {steps: 40}, tracking.wandb: off}
scales: [quickstart, quickstart_4x]
space:
  bilevel.every: {int: [1, 8], log: true}
  dwm: {size: {choice: [xs, s]}}
trials: 5
"""


def test_scales_share_what_is_set_and_differ_in_their_files(tmp_path: Path) -> None:
    config = load_tune(_file(tmp_path), ["bilevel.kl=2", "trials=7", f"storage={tmp_path}"])
    first, second = (scale_config(config, scale) for scale in config.scales)
    assert (config.first, config.total, config.folder) == ("quickstart", 7, tmp_path / "x")
    assert (first.lm.preset, second.lm.preset, second.train.lr) == ("quickstart", "5m", 2e-3)
    assert first.train.steps == second.train.steps == 40 and first.bilevel.kl == second.bilevel.kl == 2
    assert first.tracking.group == "x/quickstart" and first.seed == 0
    assert config.space["dwm.size"] == Domain(kind="choice", choices=("xs", "s"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where configs/ lies."""
    monkeypatch.chdir(Path(__file__).parents[2])


def _file(folder: Path) -> Path:
    (folder / "x.yaml").write_text(SWEEP)
    return folder / "x.yaml"


def test_values_go_over_a_configuration_by_dotted_keys(tmp_path: Path) -> None:
    base = scale_config(load_tune(_file(tmp_path)), "quickstart")
    changed = with_values(base, {"bilevel.every": 3, "dwm.size": "m", "dwm.lr": 1e-05})
    assert (changed.bilevel.every, changed.dwm.size, changed.dwm.lr) == (3, "m", 1e-5)
    assert with_values(changed, {"bilevel.every": 5, "dwm.size": "xs", "dwm.lr": base.dwm.lr}) == base


@pytest.mark.parametrize(
    ("key", "domain", "default"),
    [
        ("bilevel.every", Domain(kind="int", low=1, high=8), 5),
        ("bilevel.every", Domain(kind="int", low=6, high=8), None),
        ("bilevel.kl", Domain(kind="choice", choices=("1e-1", "5e-1")), "5e-1"),
        ("dwm.batch_attention", Domain(kind="choice", choices=("off", "on")), "on"),
        ("dwm.size", Domain(kind="choice", choices=("s", "m")), None),
    ],
)
def test_the_default_is_found_in_the_domain(tmp_path: Path, key: str, domain: Domain, default: object) -> None:
    assert default_of(scale_config(load_tune(_file(tmp_path)), "quickstart"), key, domain) == default


def test_the_ends_of_every_key_are_probed(tmp_path: Path) -> None:
    config = load_tune(_file(tmp_path))
    found = probes(config, scale_config(config, config.first))
    assert [(run.bilevel.every, run.dwm.size) for run in found] == [(1, "xs"), (8, "xs"), (5, "xs"), (5, "s")]


def test_a_grid_has_as_many_trials_as_points_and_controls(tmp_path: Path) -> None:
    assert load_tune(_file(tmp_path), ["sampler=grid", "trials=0"]).total == 2 + 8 * 2
    assert load_tune(_file(tmp_path), ["sampler=grid", "trials=4"]).total == 4


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["space.bilevel.ever.int=1,5"], "unknown configuration key bilevel.ever: did you mean bilevel.every?"),
        (["bilevel.ever=5"], "unknown configuration key bilevel.ever: did you mean bilevel.every?"),
        (["space.dwm.size.choice=xs,huge"], "space.dwm.size: dwm.size is 'huge': it must be one of"),
        (["space.dwm.floor.float=0,2"], r"space.dwm.floor: dwm.floor is 2.0: it must lie in \[0, 1\)"),
        (["space.bilevel.every.float=1,5"], "space.bilevel.every is float, but the key takes int values"),
        (["space.train.steps.int=10,50"], "space.train.steps cannot be searched"),
        (["space.cluster.workers.int=1,2"], "space.cluster.workers cannot be searched"),
        (["space.evaluation.batch.int=1,2"], "space.evaluation.batch cannot be searched"),
        (["cluster.workers=1,2"], "cluster.workers is elastic"),
        (["dwm.look_ahead=true"], "scale quickstart_4x: dwm.look_ahead weighs a batch"),
        (["space.dwm.mode.choice=learn,frozen"], "space.dwm.mode: dwm.mode=frozen needs dwm.init_from"),
        (["scales=quickstart,none"], "configuration file configs/none.yaml does not exist"),
        (["scales="], "scales is empty"),
        (["trials=2"], "trials is 2: with controls and points 2 are known before"),
        (["sampler=bayes"], "sampler is 'bayes': it must be one of tpe, random, grid"),
        (["sampler=grid", "space.bilevel.kl.float=0.1,1"], "space.bilevel.kl has no step: a grid needs one"),
        (["objectives=loss,loss"], "objectives names one twice"),
        (["asha.reduction=1"], "asha.reduction is 1"),
        (["name=a/b"], "name is 'a/b'"),
        (["set.seed=1"], "seed cannot be set"),
        (["transfer=replay,copy"], "transfer is 'copy': it must be one of replay, frozen, adapt"),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        load_tune(_file(tmp_path), overrides)
    assert str(raised.value).startswith(f"{tmp_path / 'x.yaml'}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ("[{bilevel.every: 2}]", "points, number 1: it must name the keys of space, and dwm.size is not in both"),
        ("[{bilevel.every: 9, dwm.size: s}]", "points, number 1: bilevel.every = 9 does not lie in its domain"),
        ("[3]", "points must be a list of mappings"),
        ("{bilevel.every: 2, dwm.size: s}", "points must be a list of mappings"),
        ("[{bilevel.every: 2.5, dwm.size: s}]", "bilevel.every = 2.5 does not lie"),
        ("[{bilevel.every: two, dwm.size: s}]", "bilevel.every = two does not lie"),
        ("[{bilevel.every: 2, dwm.size: s}, {bilevel.every: 2, dwm.size: s, dwm.lr: 1}]", "number 2: .* dwm.lr is not"),
    ],
)
def test_known_points_lie_in_the_space(tmp_path: Path, points: str, reason: str) -> None:
    file = _file(tmp_path)
    file.write_text(SWEEP + f"points: {points}\n")
    with pytest.raises(ConfigError, match=reason):
        load_tune(file)


def test_every_scale_must_take_the_space(tmp_path: Path) -> None:
    file = _file(tmp_path)
    larger = "{quickstart: {}, large: {set: {train.global_batch: 25}}}"
    file.write_text(
        SWEEP.replace("[quickstart, quickstart_4x]", larger).replace(
            "trials", "  bilevel.fraction: {choice: [0.5, 1]}\ntrials"
        )
    )
    with pytest.raises(ConfigError, match=r"scale large: space.bilevel.fraction: .* with train.global_batch = 25"):
        load_tune(file)


@pytest.mark.parametrize("name", ["quickstart", "370m_to_1.3b"])
def test_shipped_sweeps_load(name: str) -> None:
    config = load_tune(Path(f"configs/tune/{name}.yaml"))
    assert config.promote == 2 and config.total >= 12 and len(config.scales) == 2
