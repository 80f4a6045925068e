"""The main job on a real cluster: undisturbed, with killed processes, and under `ray job submit`."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
from orchestration.conftest import PATIENCE_S, ROOT, Console, Scraper, held, run_job, wait_for
from synthetic import tiny_config
from transformers import AutoModelForCausalLM

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.errors import ResourceError, TrainingError
from ray_dwm.models.folders import load_dwm
from ray_dwm.orchestration import follow
from ray_dwm.orchestration.series import RANK, RAY_SERIES, SERIES
from ray_dwm.orchestration.submit import Request, submit
from ray_dwm.orchestration.train import train

TIMES = ("seconds/", "bilevel_seconds/", "step_seconds/", "checkpoint_seconds", "tokens_per_s", "tflops")
TIMES += ("time_s", "dwm/overhead_frac")
OPTIONS = ("cluster.workers=2", "train.steps=60", "train.eval_every=20", "checkpoint.every=10", "train.micro_batch=4")
OPTIONS += ("dwm.lr=1e-2", "bilevel.kl=0.3")


def figures(config: RunConfig) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def line_count(config: RunConfig) -> int:
    """Lines of metrics.jsonl: one more than steps."""
    path = config.run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


class Job(NamedTuple):
    """A run that was a job, and what was seen of it."""

    config: RunConfig
    scraper: Scraper
    output: str


@pytest.fixture(scope="module")
def job(cluster: dict[str, str], shards: dict[str, Path], tmp_path_factory: Any) -> Job:
    """A finished job of `ray job submit`: two FSDP workers and a DWM actor, with W&B offline."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny_config(shards, folder, *OPTIONS, "name=undisturbed", "tracking.wandb=offline")
    (folder / "run.yaml").write_text(to_yaml(config))
    with Scraper(cluster) as scraper:
        output = run_job(cluster, "train", "--config", str(folder / "run.yaml"))
    return Job(config, scraper, output)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> RunConfig:
    """The run alone."""
    return job.config


def test_a_job_shows_progress_and_speaks_json(job: Job) -> None:
    assert "step 60/60" in job.output and "succeeded" in job.output
    events = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    assert all(event.keys() >= {"time", "level", "message", "run", "attempt", "rank", "step"} for event in events)
    assert next(event for event in events if event["message"].startswith("step 60/60"))["run"] == "undisturbed"


def test_every_series_of_the_table_is_served(job: Job) -> None:
    config, scraper, _ = job
    missing = [s.exported for s in SERIES if not s.only and not scraper.of(s.exported, config.name)]
    assert not missing, f"of {sorted(scraper.samples)}"
    for series in SERIES:
        for labels in scraper.of(series.exported, config.name):
            assert labels.keys() >= set(series.all_tags), series.name
            assert series.place != "rank 0" or labels[RANK] == "0", series.name
    assert {labels["set"] for labels in scraper.of("ray_lm_eval_loss", config.name)} == {"target", "test"}
    assert {labels[RANK] for labels in scraper.of("ray_lm_worker_memory_bytes", config.name)} == {"0", "1"}
    assert scraper.samples.keys() >= RAY_SERIES


def test_what_is_served_is_what_is_written_down(job: Job) -> None:
    config, scraper, _ = job
    lines = {line["step"]: line for line in read_metrics(config.run_dir / "metrics.jsonl")}
    (step,) = scraper.samples["ray_lm_step"].values()
    (loss,) = scraper.samples["ray_lm_loss"].values()
    # The exporter may look between two gauges of a line.
    assert loss in {lines[s]["loss"] for s in (step - 1, step, step + 1) if "loss" in lines.get(s, {})}


def test_a_gauge_that_is_set_once_is_served_to_the_end(job: Job) -> None:
    config, scraper, _ = job
    step_50, _ = list_checkpoints(config.run_dir / "checkpoints")
    assert scraper.seen["ray_lm_restarts"] > step_50.stat().st_mtime


def test_run_folder_holds_what_users_rely_on(undisturbed: RunConfig) -> None:
    folder = undisturbed.run_dir
    lines = figures(undisturbed)
    assert [line["step"] for line in lines] == list(range(61))
    assert lines[-1]["dwm/version"] == 30 - 1  # every 2 steps from step 1 on, applied with a delay of 1
    late = [line for line in lines[-30:] if "weight/good" in line and "weight/noise" in line]
    assert sum(line["weight/good"] - line["weight/noise"] for line in late) > 0.2 * len(late)
    assert lines[-1]["val/target/loss"] < lines[0]["val/target/loss"]
    weights = pq.read_table(folder / "weights")
    assert len(weights) == 60 * 8
    AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert json.loads((folder / "summary.json").read_text())["final"].keys() == {"val/target/loss", "val/test/loss"}
    _, content = load_dwm(sorted((folder / "dwm").iterdir())[-1], "0" * 64)
    assert content["learnt_on"]["step"] == 59  # the step, counted from 0, from which on it was applied
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_the_same_command_again_does_nothing(undisturbed: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = (undisturbed.run_dir / "metrics.jsonl").read_bytes()
    assert train(undisturbed) == json.loads((undisturbed.run_dir / "summary.json").read_text())
    assert "complete already" in capsys.readouterr().out
    assert (undisturbed.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_failure_that_restarting_cannot_mend_ends_the_run_at_once(
    shards: dict[str, Path], cluster: dict[str, str], driver: None, tmp_path: Path
) -> None:
    options = (
        "cluster.workers=1",
        "train.lr=1e30",
        "train.optimizer=sgd",
        "train.clip_norm=0",
        "weighting.method=uniform",
        "checkpoint.every=1",
    )
    config = tiny_config(shards, tmp_path, *OPTIONS, *options, "name=diverges")
    with Scraper(cluster) as scraper:
        with pytest.raises(TrainingError) as raised:
            train(config)
        wait_for(lambda: scraper.of("ray_lm_failures_total", "diverges"), "the count of failures")
    told = str(raised.value)
    assert told.startswith("the gradient is not finite at step") and "lower train.lr" in told
    assert re.search(r"\(rank 0 on \S+ \([\d.]+\), after step \d+, holding [\d.]+ GiB", told)
    assert [labels["kind"] for labels in scraper.of("ray_lm_failures_total", "diverges")] == ["not_finite"]
    steps = [line["step"] for line in figures(config)]
    assert f"step_{steps[-1]:09d}" in [path.name for path in (config.run_dir / "checkpoints").iterdir()]
    assert not (config.run_dir / "summary.json").exists()


@pytest.mark.slow
def test_a_killed_worker_is_named_last_with_what_is_known_of_it(
    shards: dict[str, Path], console: Console, tmp_path: Path
) -> None:
    options = ("cluster.max_failures=0", "train.steps=10000", "bilevel.stages=2", "tracking.logs=json")
    config = tiny_config(shards, tmp_path, *OPTIONS, *options, "name=no-second-chance")
    with Scraper(console.environment) as scraper:
        process = console.start(config)
        wait_for(lambda: line_count(config) > 5, "step 5")
        wait_for(lambda: scraper.of("ray_dwm_stage", config.name), "the series of what is learnt in stages")
    beat = json.loads((config.run_dir / "workers" / "rank-00001.json").read_text())
    os.kill(beat["pid"], signal.SIGKILL)
    *before, last = console.finish(config, process, code=1).splitlines()
    assert last.startswith("error: [no-second-chance] gave up after 0 restarts: rank 1 on ")
    assert beat["node"] in last and "GiB of memory" in last and "look at dmesg" in last and "same command" in last
    events = [json.loads(line) for line in before if line.startswith("{")]  # the raylet speaks in between
    failure = next(event for event in events if event["message"] == "the run has failed")
    assert (failure["run"], failure["attempt"], failure["rank"], failure["pid"]) == (config.name, 1, 1, beat["pid"])
    assert failure["step"] >= 5 and failure["memory_bytes"] > 0


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_the_same_command_continues_from_the_mirror(
    undisturbed: RunConfig,
    shards: dict[str, Path],
    driver: None,
    console: Console,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = f"mirror=file://{tmp_path / 'elsewhere'}"
    config = tiny_config(shards, tmp_path, *OPTIONS, "checkpoint.every=1000", "name=stopped", elsewhere)
    process = console.start(config)
    wait_for(lambda: line_count(config) > 25, "step 25")
    process.send_signal(signal.SIGTERM)
    last = console.finish(config, process, code=1).splitlines()[-1]
    step = line_count(config) - 1
    assert last == f"error: [stopped] stopped at step {step}: checkpoint saved, the same command continues"
    assert step < 60, "the run was over before the signal"
    assert [p.name for p in (config.run_dir / "checkpoints").iterdir()] == [f"step_{step:09d}"]
    wait_for(lambda: not console.processes("ray::RayTrainWorker"), "the end of the workers")
    config.run_dir.rename(tmp_path / "a disk that is gone")
    train(config)
    assert f"comes from {config.mirror}, step {step}" in capsys.readouterr().out
    assert figures(config) == figures(undisturbed)
    assert pq.read_table(config.run_dir / "weights").equals(pq.read_table(undisturbed.run_dir / "weights"))


def test_a_run_that_others_keep_waiting_writes_nothing(shards: dict[str, Path], driver: None, tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "runs", *OPTIONS, "cluster.free_within_s=0.5", "name=waits")
    told = "s, the run needs 4 CPUs, of which 1 CPUs are free now, with room for 0 of 2 workers"
    with held(7), pytest.raises(ResourceError, match=told) as raised:
        train(config)
    assert raised.value.exit_code == 2 and not (tmp_path / "runs").exists()


def drivers(job: str) -> list[psutil.Process]:
    """Processes of a job's driver, and of the shell that it was started by."""
    return [p for p in psutil.process_iter(["cmdline"]) if job in " ".join(p.info["cmdline"] or [])]


def test_kill_9_leaves_no_trace_whether_driver_actor_or_worker(
    undisturbed: RunConfig,
    shards: dict[str, Path],
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver of a job, which is submitted again; then the actor, which restarts alone; then a worker."""
    config = tiny_config(shards, tmp_path / "runs", *OPTIONS, "name=resubmitted")
    tree, out = tmp_path / "tree", io.StringIO()
    tree.mkdir()
    for name in ("jobs", "ray_dwm", "runtime_env.yaml"):
        (tree / name).symlink_to(ROOT / name)
    (tree / f"{tmp_path.name}.yaml").write_text(to_yaml(config))
    for key in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(key, console.environment[key])
    monkeypatch.setattr(follow, "_PAUSE_S", 0.5)
    monkeypatch.setattr(sys, "stdout", out)
    request = Request("train", ["--config", f"{tmp_path.name}.yaml"], tree)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(submit, request)
        wait_for(config.run_dir.exists, "the run")
        attached = pool.submit(submit, request)
        wait_for(lambda: "-1] is running already" in out.getvalue(), "the second command")
        wait_for(lambda: line_count(config) > 12, "step 12")
        for process in drivers(f"jobs/train.py --config {tmp_path.name}.yaml"):
            process.kill()
        assert first.result(PATIENCE_S) == attached.result(PATIENCE_S) == 128 + signal.SIGKILL
        wait_for(lambda: not console.processes("ray::RayTrainWorker"), "the end of the orphaned workers")
        made = line_count(config)
        again = pool.submit(submit, request)
        wait_for(lambda: line_count(config) > max(25, made), "step 25 of the second attempt")
        (actor,) = console.processes("ray::DwmService")
        actor.kill()
        beat = json.loads((config.run_dir / "workers" / "rank-00001.json").read_text())
        wait_for(lambda: line_count(config) > 42, "step 42 of the second attempt")
        os.kill(beat["pid"], signal.SIGKILL)
        assert line_count(config) < 60, "the run was over before the last kill"
        assert again.result(PATIENCE_S) == 0
    assert "-1] was killed by SIGKILL: the same command continues" in out.getvalue()
    assert "-2] uploading " in out.getvalue() and "[resubmitted] step 60/60" in out.getvalue()
    assert beat["attempt"] == 2 and (config.run_dir / "attempts").read_text() == "3\n"
    assert figures(config) == figures(undisturbed)
    assert pq.read_table(config.run_dir / "weights").equals(pq.read_table(undisturbed.run_dir / "weights"))


def test_failing_configuration_fails_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "train.stepz=1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "train.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
