"""A sweep's study: what is known comes first, what was interrupted comes again, and nothing else is continued."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch
from synthetic import tiny_config

from ray_dwm.analysis.tuning import Trial, finished
from ray_dwm.config import RunConfig
from ray_dwm.config.experiment import SizeConfig
from ray_dwm.config.space import Domain
from ray_dwm.config.tune import TuneConfig
from ray_dwm.errors import ConfigError, UserError
from ray_dwm.orchestration.study import (
    TRIALS,
    check_study,
    history,
    importances,
    left,
    open_study,
    searcher,
)

SPACE = {
    "bilevel.every": Domain(kind="int", low=1, high=4),
    "dwm.lr": Domain(kind="float", low=1e-3, high=3e-2, log=True),
    "dwm.size": Domain(kind="choice", choices=("xs", "s")),
}


def sweep(folder: Path, **more: Any) -> TuneConfig:
    own = {"name": "x", "storage": str(folder), "scales": {"s": SizeConfig()}, "space": SPACE, "trials": 6}
    return TuneConfig(**{**own, **more})


@pytest.fixture
def base(shards: dict[str, Path], tmp_path: Path) -> RunConfig:
    return tiny_config(shards, tmp_path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "x").mkdir()
    yield


def end(config: TuneConfig, search: OptunaSearch, number: int, start: int = 0) -> list[dict[str, Any]]:
    """Trials as Tune would run them: asked for, and told."""
    asked = []
    for k in range(start, start + number):
        asked.append(search.suggest(f"tune-{k}"))
        search.on_trial_complete(f"tune-{k}", {"loss": 3.0 + 0.1 * k, "overhead": 0.1})
    return asked


def test_what_is_known_comes_first_and_the_study_is_on_disk(base: RunConfig, tmp_path: Path) -> None:
    config = sweep(tmp_path, points=({"bilevel.every": "3", "dwm.lr": "1e-2", "dwm.size": "s"},))
    study = open_study(config, base)
    asked = end(config, searcher(config, study), 5)
    assert asked[0] == {
        "bilevel.every": 2,
        "dwm.lr": 0.003,
        "dwm.size": "xs",
        "folder": "defaults",
        "control": "defaults",
    }
    assert asked[1] == {"folder": "uniform", "control": "uniform"}
    assert asked[2] == {"bilevel.every": 3, "dwm.lr": 1e-2, "dwm.size": "s", "folder": "point-1", "control": ""}
    assert [one["folder"] for one in asked[3:]] == ["0003", "0004"]
    assert all(domain.holds(asked[3][key]) for key, domain in SPACE.items())
    stored = optuna.load_study(study_name="x", storage=f"sqlite:///{tmp_path / 'x' / 'study.db'}")
    assert [t.values for t in stored.trials] == [[pytest.approx(3.0 + 0.1 * k), 0.1] for k in range(5)]
    trials = history(config, study)
    assert [t.id for t in trials] == ["defaults", "uniform", "point-1", "0003", "0004"]
    assert {t.state for t in trials} == {"ended early"}  # no run folder says that they were trained to their end
    assert left(config, trials) == 1


def test_defaults_outside_the_space_are_run_without_values(base: RunConfig, tmp_path: Path) -> None:
    config = sweep(tmp_path, space={"bilevel.every": Domain(kind="int", low=3, high=4)})
    asked = end(config, searcher(config, open_study(config, base)), 1)
    assert asked == [{"folder": "defaults", "control": "defaults"}]


def test_an_interrupted_trial_comes_again_in_its_folder_and_ended_ones_do_not(base: RunConfig, tmp_path: Path) -> None:
    config = sweep(tmp_path)
    search = searcher(config, open_study(config, base))
    end(config, search, 3)
    interrupted = search.suggest("tune-3")
    before = optuna.load_study(study_name="x", storage=f"sqlite:///{tmp_path / 'x' / 'study.db'}").trials
    study = open_study(config, base)  # as the same command does after a kill
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3 + [TrialState.FAIL, TrialState.WAITING]
    assert [t.values for t in study.trials[:3]] == [t.values for t in before[:3]]
    assert left(config, history(config, study)) == 3
    assert [t.state for t in open_study(config, base).trials] == [t.state for t in study.trials]  # twice is once
    again = end(config, searcher(config, study), 3, start=4)
    assert again[0] == interrupted
    assert interrupted is not None and interrupted["folder"] == "0003"
    trials = history(config, study)
    assert left(config, trials) == 0 and len(finished(trials)) == 6
    assert len({t.id for t in trials}) == len(trials) == 6


def test_a_failed_trial_is_marked_with_its_reason(base: RunConfig, tmp_path: Path) -> None:
    config = sweep(tmp_path)
    study = open_study(config, base)
    search = searcher(config, study)
    for k in range(2):
        search.suggest(f"tune-{k}")
        search.on_trial_complete(f"tune-{k}", error=True)
    (tmp_path / "x" / TRIALS).mkdir()
    (tmp_path / "x" / TRIALS / "defaults.json").write_text(json.dumps({"reason": "no memory"}))
    trials = history(config, study)
    assert [(t.id, t.state) for t in trials] == [("defaults", "failed"), ("uniform", "failed")]
    assert trials[0].reason == "no memory" and trials[1].reason
    assert left(config, trials) == 4
    assert [t.state for t in open_study(config, base).trials] == [TrialState.FAIL] * 2  # marked: not tried again


def test_figures_of_a_trained_trial_are_its_runs(base: RunConfig, tmp_path: Path) -> None:
    config = sweep(tmp_path)
    study = open_study(config, base)
    end(config, searcher(config, study), 1)
    run = tmp_path / "x" / TRIALS / "defaults"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"final": {"val/target/loss": 2.5}, "overhead_frac": 0.07}))
    trial = history(config, study)[0]
    assert (trial.state, trial.loss, trial.overhead) == ("done", 2.5, 0.07)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_suggestions_follow_from_seed_and_state(base: RunConfig, tmp_path: Path, sampler: str) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        config = sweep(tmp_path, name=name, sampler=sampler, startup=3, seed=seed)
        drawn.append(end(config, searcher(config, open_study(config, base)), 6))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({json.dumps(one) for one in drawn[0]}) == 6


def test_a_grid_visits_every_point_once_also_when_it_is_interrupted(base: RunConfig, tmp_path: Path) -> None:
    space = {"bilevel.every": Domain(kind="int", low=1, high=3), "dwm.size": SPACE["dwm.size"]}
    config = sweep(tmp_path, space=space, sampler="grid", trials=0)
    asked = end(config, searcher(config, open_study(config, base)), 4)
    asked += end(config, searcher(config, open_study(config, base)), config.total - 4, start=4)
    points = {(one["bilevel.every"], one["dwm.size"]) for one in asked if not one["control"]}
    assert len(asked) == 8 and points == {(n, size) for n in (1, 2, 3) for size in ("xs", "s")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"space": {**SPACE, "bilevel.every": Domain(kind="int", low=1, high=5)}},
            "another space: bilevel.every was int",
        ),
        ({"space": {"bilevel.every": SPACE["bilevel.every"]}}, "another space: dwm.lr was .* now it is not there"),
        ({"measure": "test"}, "another metric: measure was target, now it is test"),
        ({"objectives": ("loss",)}, "another metric: objectives was loss, overhead, now it is loss"),
    ],
)
def test_a_study_of_something_else_is_left_as_it_is(
    base: RunConfig, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    config = sweep(tmp_path)
    end(config, searcher(config, open_study(config, base)), 2)
    before = (tmp_path / "x" / "study.db").read_bytes()
    for call in (check_study, open_study):
        with pytest.raises(ConfigError, match=rf"study x in sqlite.* was made for {reason}") as raised:
            call(sweep(tmp_path, **change), base)
        assert "\n" not in str(raised.value)
    assert (tmp_path / "x" / "study.db").read_bytes() == before


def test_a_study_of_another_configuration_is_refused(base: RunConfig, shards: dict[str, Path], tmp_path: Path) -> None:
    open_study(sweep(tmp_path), base)
    with pytest.raises(ConfigError, match=r"another configuration: train\.lr was 0\.003, now it is 0\.5"):
        check_study(sweep(tmp_path), tiny_config(shards, tmp_path, "train.lr=0.5"))
    check_study(sweep(tmp_path, trials=9), tiny_config(shards, tmp_path, "checkpoint.every=2"))  # more of the same


def test_a_sweep_of_the_same_name_elsewhere_in_one_database_is_refused(base: RunConfig, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    open_study(sweep(tmp_path, study=url), base)
    check_study(sweep(tmp_path, study=url), base)
    with pytest.raises(ConfigError, match=r"another folder: storage was .*/x, now it is .*/other/x"):
        check_study(sweep(tmp_path / "other", study=url), base)


def test_a_storage_that_cannot_be_used_is_named(base: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "x" / "study.db"
    path.write_text("no database at all, but long enough to be taken for one" * 40)
    with pytest.raises(
        UserError, match=r"study storage sqlite:///.*study.db cannot be used \(file is not a database\)"
    ):
        check_study(sweep(tmp_path), base)
    path.unlink()
    open_study(sweep(tmp_path), base)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"cannot be used \(database is locked\): wait for whoever holds it"):
            check_study(sweep(tmp_path), base)
    for url, reason in (
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("nonsense", "'nonsense' cannot be used"),
        ("mysql://u:secret@h/d", r"mysql://u:\*\*\*@h/d"),
    ):
        with pytest.raises(UserError, match=reason) as raised:
            check_study(sweep(tmp_path, study=url), base)
        assert "secret" not in str(raised.value)


def test_importances_find_the_key_that_matters(tmp_path: Path) -> None:
    config = sweep(tmp_path)
    trials = [
        Trial(
            id=f"{k}",
            values={"bilevel.every": 1 + k % 4, "dwm.lr": 0.001 * (1 + k % 7), "dwm.size": ("xs", "s")[k % 2]},
            state="done",
            loss=float(k % 4),
            overhead=float(k % 2),
        )
        for k in range(16)
    ]
    found = importances(config, trials)
    assert max(found["loss"], key=lambda key: found["loss"][key]) == "bilevel.every"
    assert found["overhead"]["dwm.size"] > 0.5
    assert sum(found["loss"].values()) == pytest.approx(1)
    assert importances(config, trials[:3]) == {}
    assert importances(config, [*map(_alike, trials)]) == {}


def _alike(trial: Trial) -> Trial:
    return Trial(id=trial.id, values=trial.values, state="done", loss=1.0, overhead=0.0)
