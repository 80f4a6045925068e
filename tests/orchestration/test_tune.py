"""Sweeps: what is checked before the start, what goes on to the next scale; and a real one, killed half-way."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from orchestration.conftest import PATIENCE_S, ROOT, Console, run_job, wait_for
from orchestration.test_experiment import Trainer, declare, given_dwms_fit  # noqa: F401
from synthetic import make_shards
from typer.testing import CliRunner

from ray_dwm.analysis.tuning import Trial
from ray_dwm.cli import app
from ray_dwm.config import load
from ray_dwm.config.experiment import grid
from ray_dwm.config.tune import TuneConfig, load_tune, scale_config
from ray_dwm.data.records import read_json
from ray_dwm.engine.rundir import read_summary
from ray_dwm.errors import DataError, UserError
from ray_dwm.orchestration import trial
from ray_dwm.orchestration.experiment import experiment
from ray_dwm.orchestration.progress import last_line
from ray_dwm.orchestration.promotion import config_of, dwms_of, promoted, rows_of
from ray_dwm.orchestration.study import TRIALS, url_of
from ray_dwm.orchestration.trial import Curve, curve, trial_config, values_of
from ray_dwm.orchestration.tune import Asha, check
from ray_dwm.orchestration.tune_plan import planned
from ray_dwm.orchestration.tune_progress import Progress
from ray_dwm.orchestration.tune_report import Stage, write_report

SWEEP = """
name: x
scales: {small: {}, large: {set: {train.steps: 8}}}
space:
  bilevel.every: {int: [1, 4]}
  dwm.lr: {float: [1e-3, 3e-2], log: true}
trials: 4
promote: 1
transfer: [replay, frozen, adapt]
"""


def sweep(shards: Mapping[str, Path], folder: Path, *overrides: str, text: str = SWEEP) -> TuneConfig:
    """A sweep of tiny runs."""
    declare(shards, folder)  # writes base.yaml
    (folder / "tune.yaml").write_text(f"config: {folder / 'base.yaml'}\n{text}")
    return load_tune(folder / "tune.yaml", [f"storage={folder / 'runs'}", *overrides])


CHOSEN = Trial(id="0002", values={"bilevel.every": 3, "dwm.lr": 0.01}, state="done", loss=3.0, overhead=0.1)


def with_dwm(config: TuneConfig) -> Path:
    """The dwm folder of a trial."""
    folder = config.folder / TRIALS / CHOSEN.id / "dwm"
    for version in ("v000001", "v000004", "v000005.tmp"):  # the last was being written at a kill
        (folder / version).mkdir(parents=True)
    (folder / "trajectory.json").write_text("{}")
    return folder


def test_what_is_promoted_is_learnt_anew_and_carried_over(shards: dict[str, Path], tmp_path: Path) -> None:
    config = sweep(shards, tmp_path)
    folder = with_dwm(config)
    found = promoted(config, "large", [CHOSEN], dwms_of(config, [CHOSEN]))
    assert found.folder == config.folder / "scale-large" and found.set["train.steps"] == "8"
    assert list(found.methods) == [
        "uniform",
        "defaults",
        "trial-0002",
        "trial-0002-replay",
        "trial-0002-frozen",
        "trial-0002-adapt",
    ]
    values = {"bilevel.every": "3", "dwm.lr": "0.01"}
    assert found.methods["trial-0002"].set == values
    assert found.methods["trial-0002-replay"].set == {
        **values,
        "dwm.mode": "replay",
        "dwm.trajectory": str(folder),
    }
    for how in ("frozen", "adapt"):
        given = {"dwm.mode": how, "dwm.init_from": str(folder / "v000004")}
        assert found.methods[f"trial-0002-{how}"].set == values | given
    shutil.rmtree(folder)
    assert len(promoted(config, "large", [CHOSEN], dwms_of(config, [CHOSEN])).methods) == 3  # nothing to carry over


@pytest.mark.usefixtures("given_dwms_fit")
def test_a_scale_is_an_experiment_whose_best_is_recommended(shards: dict[str, Path], tmp_path: Path) -> None:
    config = sweep(shards, tmp_path)
    with_dwm(config)
    dwms = dwms_of(config, [CHOSEN])
    declared = promoted(config, "large", [CHOSEN], dwms)
    experiment(declared, grid(declared), train=Trainer(), ready=lambda runs: "a device")
    for name, loss in (("trial-0002-replay", 1.0), ("trial-0002", 2.0)):
        path = declared.folder / "large" / name / "seed-0" / "summary.json"
        content = read_json(path)
        path.write_text(json.dumps({**content, "final": dict.fromkeys(content["final"], loss)}))
    rows = rows_of(config, declared, [CHOSEN])
    assert [(row.trial, row.how, row.loss) for row in rows[:2]] == [("0002", "replay", 1.0), ("0002", "learn", 2.0)]
    assert {(row.trial, row.how) for row in rows} == {
        ("uniform", "uniform"),
        ("defaults", "learn"),
        *(("0002", how) for how in ("learn", "replay", "frozen", "adapt")),
    }
    write_report(config, [CHOSEN], [Stage("large", rows, dwms)], "a device")
    recommended = load([config.folder / "recommended.yaml"])
    assert recommended == config_of(config, "large", rows[0], [CHOSEN], dwms)
    assert (recommended.dwm.mode, recommended.bilevel.every, recommended.train.steps) == ("replay", 3, 8)
    assert recommended.name == "x-recommended" and recommended.dwm.trajectory == str(dwms["0002"])
    assert "trial-0002" not in (declared.folder / "leaderboard.md").read_text().partition("## Notes")[2]


def test_trials_differ_from_the_scale_in_their_values_alone(shards: dict[str, Path], tmp_path: Path) -> None:
    config = sweep(shards, tmp_path)
    base = scale_config(config, "small")
    run = trial_config(base, {"bilevel.every": 4, "dwm.lr": 0.02, "folder": "0007", "control": ""}, tmp_path / "t")
    assert run.run_dir == tmp_path / "t" / "0007" and (run.bilevel.every, run.dwm.lr) == (4, 0.02)
    assert values_of({"folder": "uniform", "control": "uniform"}) == {"weighting.method": "uniform"}
    assert values_of({"folder": "defaults", "control": "defaults"}) == {}


def test_a_curve_has_the_overhead_so_far(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [
        {"step": 0, "tokens": 0, "val/target/loss": 4.0},
        {"step": 1, "tokens": 10, "seconds/step": 1.0, "seconds/bilevel": 0.5},
        {"step": 2, "tokens": 20, "seconds/step": 2.0, "val/target/loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert curve(tmp_path / "metrics.jsonl", "val/target/loss") == [
        {"step": 2, "tokens": 20, "loss": 3.0, "overhead": pytest.approx(0.5 / 3)}
    ]
    assert curve(tmp_path / "none", "val/target/loss") == []


def test_a_curve_is_read_once_an_evaluation(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = scale_config(sweep(shards, tmp_path), "small")
    told: list[dict[str, float]] = []
    looks, read = [], []
    monkeypatch.setattr(trial, "_POLL_S", 0.01)
    monkeypatch.setattr(trial.tune, "report", told.append)
    monkeypatch.setattr(trial, "last_line", lambda path: looks.append(path) or last_line(path))
    monkeypatch.setattr(trial, "curve", lambda *given: read.append(given) or curve(*given))
    base.run_dir.mkdir(parents=True)
    with Curve(base, "target"), (base.run_dir / "metrics.jsonl").open("a") as stream:
        for step in range(base.train.steps):
            line = {"step": step, "tokens": 10 * step, "loss": 3.0}
            if step % base.train.eval_every == 0:
                line["val/target/loss"] = 4.0 - step
            stream.write(f"{json.dumps(line)}\n")
            stream.flush()
            before = len(looks)
            wait_for(lambda before=before: len(looks) > before + 2, "three looks at the line")
    points = range(base.train.eval_every, base.train.steps, base.train.eval_every)
    assert len(points) >= 1 and [report["tokens"] for report in told] == [10 * step for step in points]
    assert len(read) == len(points)


def test_what_is_wrong_is_said_before_anything_starts(shards: dict[str, Path], tmp_path: Path) -> None:
    wrong = [
        (["measure=tset"], "measure is 'tset', and scale small has no such evaluation set: target, test"),
        (["bilevel.target_batch=1000"], "asks for 1000"),
        (["space.bilevel.target_batch.int=8,1000"], "asks for 1000"),
        (["data.train=/nowhere"], "/nowhere holds no manifest.json"),
        ([f"storage={tmp_path / 'tune.yaml'}"], "cannot be written"),
        (["asha.grace_tokens=1000000"], "asha.grace_tokens is 1000000, and a trial trains on"),
        (["evaluation.tasks=none.jsonl"], "none.jsonl cannot be read"),
        # What only the later scale would meet, hours later.
        (["seeds=0,0"], "seeds names 0 twice"),
        (["scales.large.set.train.eval_every=8"], "too few points for a curve"),
        (["scales.large.set.bilevel.target_batch=1000"], "asks for 1000"),
        (["study=sqlite:////proc/nowhere/study.db"], "cannot be used"),
    ]
    for overrides, message in wrong:
        with pytest.raises(UserError) as raised:
            check(sweep(shards, tmp_path, *overrides))
        assert message in str(raised.value) and "\n" not in str(raised.value), overrides
        assert not (tmp_path / "runs").exists()


def test_a_scale_of_another_tokenizer_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    own = []
    for seed, name in enumerate(("train", "target", "held_out"), start=5):
        make_shards(tmp_path / name, good=128, noise=0, seed=seed, files=1, tokenizer_sha256="1" * 64)
        own.append(f"scales.large.set.data.{name.replace('held_out', 'held_out.test')}={tmp_path / name}")
    with pytest.raises(
        DataError, match="scale large was prepared with tokenizer synthetic, scale small with synthetic"
    ):
        check(sweep(shards, tmp_path, *own))


def test_a_dry_run_plans_every_run_without_data(shards: dict[str, Path], tmp_path: Path) -> None:
    runs = planned(check(sweep(shards, tmp_path, "data.train=/nowhere", "seeds=0,1"), prepare=False))
    assert [(each.scale, each.name, each.times) for each in runs] == [
        ("small", "defaults", 1),
        ("small", "uniform", 1),
        ("small", "0000", 1),
        ("small", "0001", 1),
        ("large", "uniform", 2),
        ("large", "defaults", 2),
        *(("large", f"promoted, {how}", 2) for how in ("learn", "replay", "frozen", "adapt")),
    ]
    assert runs[1].run.weighting.method == "uniform" and runs[7].run.dwm.mode == "replay"
    assert runs[2].run.bilevel.every == runs[2].values["bilevel.every"]


def test_the_shipped_cluster_sweep_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(app, ["tune", "--config", "configs/tune/370m_to_1.3b.yaml", "--dry-run"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "bilevel.every │ int from 2 to 50, log │ 10" in told
    assert "370m │ 370m │ 32 │ 8 │ 66 │ 8" in told and "1.3b │ 1.3b │ 10 │ 64 │ 514 │ 64" in told
    hours = [float(word.replace(",", "")) for word in re.findall(r"total: ([\d,]+) GPU-hours", told)]
    assert 3000 < hours[0] < 6000  # 32 x 75 at 370M, 10 x 200 at 1.3B


def test_trials_end_early_by_those_before_and_controls_do_not() -> None:
    asha = Asha(time_attr="tokens", metric="loss", mode="min", grace_period=10, max_t=100, reduction_factor=2)
    for name, loss in (("a", 3.0), ("b", 3.2)):
        asha.remember(name, [{"tokens": 5, "loss": 9.0}, {"tokens": 10, "loss": loss}, {"tokens": 100, "loss": 1.0}])
    decisions = {}
    for control, loss in (("", 3.5), ("uniform", 3.5), ("", 2.9)):
        trial = SimpleNamespace(trial_id=f"{control}{loss}", config={"control": control})
        asha.on_trial_add(None, trial)
        decisions[control, loss] = asha.on_trial_result(None, trial, {"tokens": 10, "loss": loss})
    assert decisions == {("", 3.5): asha.STOP, ("uniform", 3.5): asha.CONTINUE, ("", 2.9): asha.CONTINUE}


def test_progress_is_a_line_for_each_beginning_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    before = [Trial(id="uniform", control="uniform", state="done", loss=4.0, overhead=0.0)]
    progress = pickle.loads(pickle.dumps(Progress("x", ["dwm.lr", "bilevel.every"], 3, before)))  # as Tune keeps it
    progress.setup()
    config = {"bilevel.every": 3, "dwm.lr": 0.0123456, "folder": "0002", "control": ""}
    told = SimpleNamespace(config=config, last_result=None)
    progress.on_trial_start(0, [], told)
    told.last_result = {"loss": 3.5, "overhead": 0.25}
    progress.on_trial_result(0, [], told, told.last_result)
    progress.on_trial_complete(0, [], told)
    told.last_result = {**told.last_result, "loss": 3.25, "complete": 1}
    progress.on_trial_complete(0, [], told)
    progress.on_trial_error(0, [], told)
    assert capsys.readouterr().out.splitlines() == [
        "[x] 1 of 3 ended  0002  lr 0.01235  every 3  begun",
        "[x] 2 of 3 ended  0002  lr 0.01235  every 3  loss 3.5000  overhead 25.0%  ended early",
        "[x] 2 of 3 ended  0002  lr 0.01235  every 3  loss 3.2500  overhead 25.0%  done",
        "[x] 2 of 3 ended  0002  lr 0.01235  every 3  loss 3.2500  overhead 25.0%  failed",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)  # for machines that do something else too
def test_a_real_sweep_survives_a_killed_driver(shards: dict[str, Path], console: Console, tmp_path: Path) -> None:
    text = SWEEP.replace("large: {set: {train.steps: 8}}", "").replace("promote: 1", "promote: 0")
    config = sweep(shards, tmp_path, text=text)
    arguments = ["--config", str(tmp_path / "tune.yaml"), f"storage={config.storage}"]
    command = [sys.executable, "-m", "ray_dwm.cli", "tune", *arguments]
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=console.environment, cwd=ROOT)
    trials = config.folder / TRIALS

    def states() -> list[TrialState]:
        if not (config.folder / "study.db").is_file():
            return []
        study = optuna.load_study(study_name="x", storage=url_of(config)) if first.poll() is None else None
        assert study is not None, (tmp_path / "first.log").read_text()
        return [trial.state for trial in study.trials]

    wait_for(lambda: list(trials.glob("*/summary.json")), "the first trial's end")
    wait_for(lambda: {TrialState.COMPLETE, TrialState.RUNNING} <= set(states()), "its figures in the study")
    os.kill(first.pid, signal.SIGKILL)
    first.wait(PATIENCE_S)
    before = optuna.load_study(study_name="x", storage=url_of(config)).trials
    ended = [trial for trial in before if trial.state == TrialState.COMPLETE]
    kept = {path: path.read_bytes() for t in ended for path in (trials / t.user_attrs["folder"]).glob("metrics.jsonl")}
    assert ended and len(kept) == len(ended)
    told = run_job(console.environment, "tune", *arguments)  # the same command, as a job
    assert f"4 trials, {len(ended)} have ended" in told
    assert {path: path.read_bytes() for path in kept} == kept
    after = optuna.load_study(study_name="x", storage=url_of(config)).trials
    for one in ended:
        assert (after[one.number].values, after[one.number].params) == (one.values, one.params)
    report = read_json(config.folder / "report.json")
    assert [trial["state"] for trial in report["trials"]] == ["done"] * 4, report["trials"]
    assert {"defaults", "uniform"} < {trial["id"] for trial in report["trials"]}
    losses = {trial["id"]: trial["loss"] for trial in report["trials"]}
    for name, loss in losses.items():
        run = load([trials / name / "config.yaml"])
        assert (read_summary(run) or {})["final"]["val/target/loss"] == loss
    assert report["recommended"]["loss"] == min(losses.values())
    assert load([config.folder / "recommended.yaml"]).name == "x-recommended"
    assert list((config.folder / "tune").glob("*/events.out.tfevents.*"))  # what TensorBoard shows
