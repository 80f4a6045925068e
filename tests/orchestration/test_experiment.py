"""Experiments: every cell is checked first, what is done stays done, what fails is said; and one on a real cluster."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from orchestration.conftest import PATIENCE_S, ROOT, Console, Scraper
from synthetic import make_shards
from synthetic_runs import fill

from ray_dwm.analysis.grid import record_path
from ray_dwm.config import RunConfig
from ray_dwm.config.experiment import Cell, ExperimentConfig, load_experiment
from ray_dwm.data.records import read_json
from ray_dwm.engine.rundir import stop_path
from ray_dwm.errors import ConfigError, Stopped, TrainingError, UserError
from ray_dwm.orchestration.cells import configure, is_done, with_budget
from ray_dwm.orchestration.experiment import choose, experiment, table
from ray_dwm.orchestration.run import absolute

METHODS = """
name: x
baseline: uniform
measure: test
repeat: dwm
seeds: [0, 1]
methods:
  uniform: {set: {weighting.method: uniform}}
  frozen: {set: {dwm.mode: frozen}, needs: {dwm.init_from: dwm}}
  dwm: {label: DWM}
"""


def declare(shards: Mapping[str, Path], folder: Path, *overrides: str, text: str = METHODS) -> ExperimentConfig:
    """An experiment of tiny runs."""
    base = folder / "base.yaml"
    data = {"train": shards["train"], "target": shards["target"], "held_out": {"test": shards["held_out"]}}
    train = {"steps": 6, "global_batch": 8, "micro_batch": 8, "warmup_steps": 2, "eval_every": 3, "eval_sequences": 16}
    content = {
        "data": data,
        "lm": {"preset": "tiny"},
        "train": train,
        "bilevel": {"every": 2, "warmup_steps": 1},
        "checkpoint": {"every": 3},
        "cluster": {"workers": 1},
        "tracking": {"wandb": "off"},
    }
    base.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
    file = folder / "x.yaml"
    file.write_text(f"config: {base}\n{text}")
    return load_experiment(file, [f"storage={folder / 'runs'}", *overrides])


class Trainer:
    """In place of training: what it was asked for, and run folders written by hand."""

    def __init__(self, fails: Callable[[RunConfig], Exception | None] = lambda config: None) -> None:
        self.asked: list[str] = []
        self._fails = fails

    def __call__(self, config: RunConfig) -> None:
        """One run."""
        folder = config.run_dir
        self.asked.append("/".join(folder.parts[-3:]))
        if (error := self._fails(config)) is not None:
            raise error
        fill(absolute(config), 3.0 - 0.1 * config.seed)
        if config.learns_dwm:
            (folder / "dwm" / "v000003").mkdir(parents=True)


def run(config: ExperimentConfig, train: Trainer, methods: str = "") -> None:
    experiment(config, choose(config, methods.split(), []), train=train, ready=lambda runs: "a device")


@pytest.fixture
def given_dwms_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs written by hand leave no DWM that could be read."""
    monkeypatch.setattr("ray_dwm.engine.checks._check_given_dwm", lambda config, train: None)
    monkeypatch.setattr("ray_dwm.engine.rundir.file_sha256", lambda path: Path(path).name)


@pytest.mark.usefixtures("given_dwms_fit")
def test_cells_run_once_in_the_order_of_their_needs(shards: dict[str, Path], tmp_path: Path) -> None:
    config, train = declare(shards, tmp_path), Trainer()
    run(config, train)
    assert len(train.asked) == len(set(train.asked)) == 2 * 5 + 1
    assert train.asked.index("tiny/dwm/seed-0") < train.asked.index("tiny/frozen/seed-0")
    assert train.asked[-1] == "tiny/dwm/seed-0-again"
    stored = (config.folder / "tiny/frozen/seed-1/config.yaml").read_text()
    assert f"init_from: {config.folder}/tiny/dwm/seed-1/dwm/v000003" in stored
    record = read_json(record_path(config.folder, Cell("tiny", "frozen", 1)))
    assert record["state"] == "done" and record["devices"] == ["a device"]
    assert record["needs"] == {"dwm.init_from": "tiny/dwm/seed-1"}
    for name in ("leaderboard.md", "leaderboard.json", "leaderboard.html", "experiment.yaml"):
        assert (config.folder / name).is_file()
    again = Trainer()
    run(config, again)
    assert again.asked == []


@pytest.mark.usefixtures("given_dwms_fit")
def test_a_failed_cell_is_said_and_tried_again_and_the_others_go_on(
    shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = declare(shards, tmp_path)
    broken = Trainer(lambda c: TrainingError("no memory") if c.learns_dwm and c.seed == 0 else None)
    with pytest.raises(TrainingError, match="5 of 11 cells failed") as failed:
        run(config, broken)
    assert "tiny/dwm/seed-0, " in str(failed.value) and "\n" not in str(failed.value)
    board = (config.folder / "leaderboard.md").read_text()
    assert "- tiny/dwm/seed-0: failed: no memory." in board
    assert "- tiny/frozen/seed-0: failed: it needs tiny/dwm/seed-0, which failed." in board
    left_out = read_json(record_path(config.folder, Cell("tiny", "frozen", 0)))
    assert left_out.keys() == {"state", "reason"}  # it ran on no device and with no code
    assert "tiny/dwm/seed-0 failed: no memory" in capsys.readouterr().out
    mended = Trainer()
    run(config, mended)
    assert set(mended.asked) == {
        f"tiny/{name}" for name in ("dwm/seed-0", "frozen/seed-0", "null-random/seed-0", "null-shuffled/seed-0")
    } | {"tiny/dwm/seed-0-again"}
    assert "failed" not in (config.folder / "leaderboard.md").read_text()


def test_an_error_that_nobody_foresaw_fails_its_cell_alone(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)
    broken = Trainer(lambda c: ZeroDivisionError("oh") if c.seed == 0 else None)
    with pytest.raises(TrainingError, match="1 of 2 cells failed"):
        run(config, broken, "uniform")
    assert "failed: ZeroDivisionError: oh." in (config.folder / "leaderboard.md").read_text()
    assert is_done(config, Cell("tiny", "uniform", 1))


def test_ctrl_c_ends_at_once_and_the_same_command_continues(shards: dict[str, Path], tmp_path: Path) -> None:
    config, stopping = declare(shards, tmp_path), []

    def interrupt(run: RunConfig) -> Exception | None:
        stopping.append(run)
        if len(stopping) == 2:
            raise KeyboardInterrupt
        return None

    with pytest.raises(Stopped, match="interrupted, 1 of 2 cells are done: the same command continues"):
        run(config, Trainer(interrupt), "uniform")
    assert "tiny/uniform/seed-1: begun, not finished." in (config.folder / "leaderboard.md").read_text()
    after = Trainer()
    run(config, after, "uniform")
    assert after.asked == ["tiny/uniform/seed-1"]


def test_a_stopped_run_is_no_failed_one(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)

    def stop(run: RunConfig) -> Exception:
        run.run_dir.mkdir(parents=True)
        stop_path(run).touch()
        return TrainingError("stopped at step 3")

    train = Trainer(stop)
    with pytest.raises(Stopped, match="stopped at step 3"):
        run(config, train, "uniform")
    assert train.asked == ["tiny/uniform/seed-0"]
    assert "begun, not finished" in (config.folder / "leaderboard.md").read_text()


def test_a_cell_of_another_configuration_is_refused_before_anything_runs(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    run(declare(shards, tmp_path), Trainer(), "uniform")
    train = Trainer()
    with pytest.raises(ConfigError, match=r"tiny/uniform/seed-0: run folder .* was made with train.lr = 0.001, now"):
        run(declare(shards, tmp_path, "train.lr=0.5"), train)
    assert train.asked == []


def test_what_is_done_bounds_what_is_run_beside_it(shards: dict[str, Path], tmp_path: Path) -> None:
    run(declare(shards, tmp_path), Trainer(), "uniform")
    train = Trainer()
    with pytest.raises(ConfigError, match=r"tiny/uniform/seed-0: run folder .* was made with train.steps = 6, now"):
        run(declare(shards, tmp_path, "train.steps=8"), train, "dwm")
    assert train.asked == []


def test_what_is_wrong_is_said_before_anything_runs(shards: dict[str, Path], tmp_path: Path) -> None:
    wrong = [
        (["methods.dwm.set.train.steps=8"], "tokens is 768 in tiny/uniform/seed-0 and 1024 in tiny/dwm/seed-0"),
        (["methods.dwm.set.train.eval_every=2"], "train.eval_every is 3 in"),
        (["train.eval_every=4"], "too few points for a curve"),
        (["measure=tset"], "measure is 'tset', and there is no such evaluation set: they are target, test"),
        (
            [f"methods.dwm.set.data.target={shards['held_out']}"],
            "the held-out set test, by which the experiment decides",
        ),
        (["methods.dwm.set.data.target=/nowhere"], "tiny/dwm/seed-0: /nowhere holds no manifest.json"),
        (["bilevel.every=0"], "bilevel.every=0 lets clocks decide"),
        (["methods.dwm.set.data.selection=dsdm", "methods.dwm.set.selection.budget=10_000_000"], "the pool"),
        (["methods.dwm.set.dwm.sizze=s"], "unknown configuration key dwm.sizze: did you mean dwm.size?"),
    ]
    for overrides, message in wrong:
        train = Trainer()
        with pytest.raises(UserError) as raised:
            run(declare(shards, tmp_path, *overrides), train)
        assert message in str(raised.value), overrides
        assert train.asked == [] and not (tmp_path / "runs").exists()


def test_another_tokenizer_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    others = {}
    for seed, name in enumerate(("train", "target", "held_out"), start=5):
        others[name] = tmp_path / "other" / name
        make_shards(others[name], good=128, noise=0, seed=seed, files=1, tokenizer_sha256="1" * 64)
    own = [f"methods.dwm.set.data.{name}={others[name]}" for name in ("train", "target")]
    config = declare(shards, tmp_path, *own, f"methods.dwm.set.data.held_out.test={others['held_out']}")
    with pytest.raises(
        ConfigError, match=r"tokenizer of data.train is synthetic \(00000000\) in tiny/uniform/seed-0 and"
    ):
        run(config, Trainer())


def test_a_subset_takes_what_it_needs_along(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)
    cells = [cell.path for cell in choose(config, ["frozen"], [1])]
    assert cells == ["tiny/dwm/seed-1", "tiny/frozen/seed-1"]
    with pytest.raises(ConfigError, match="--methods names froze, which x does not have: uniform, frozen, dwm"):
        choose(config, ["froze"], [])
    with pytest.raises(ConfigError, match="--seeds names 2, which x does not have: 0, 1"):
        choose(config, [], [2])


def test_the_table_alone_runs_nothing(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)
    with pytest.raises(UserError, match="does not exist: run it without --only-table first"):
        table(config)
    run(config, Trainer(), "uniform")
    assert [row.method for row in table(declare(shards, tmp_path, "measure=target")).rows if row.seeds] == ["uniform"]


def test_selected_tokens_are_those_that_are_trained_on(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path, "methods.dwm.set.data.selection=random")
    chosen = configure(config, Cell("tiny", "dwm", 0))
    assert chosen.selection.budget == 0
    assert with_budget(chosen).selection.budget == 6 * 8 * 16


@pytest.mark.usefixtures("given_dwms_fit")
def test_what_is_to_be_analysed_is_when_all_is_done(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[Path], Path]] = []
    monkeypatch.setattr(
        "ray_dwm.orchestration.analyze.analyze", lambda folders, how: asked.append((folders, how.output))
    )
    config = declare(shards, tmp_path, "analyze=dwm")
    with pytest.raises(TrainingError):
        run(config, Trainer(lambda c: TrainingError("no memory") if c.dwm.mode == "frozen" else None))
    assert asked == []
    run(config, Trainer())
    size = config.folder / "tiny"
    assert asked == [
        ([size / f"uniform/{seed}", size / f"dwm/{seed}"], size / f"dwm/{seed}" / "report.html")
        for seed in ("seed-0", "seed-1")
    ]
    with pytest.raises(ConfigError, match="analyze is 'dwn', and there is none of that name: did you mean dwm"):
        declare(shards, tmp_path, "analyze=dwn")


def test_a_cluster_of_ones_own_has_room_for_all_cells_at_once(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(run: RunConfig, at_once: int) -> None:
        raise UserError(f"a cluster for {at_once}, learning: {run.learns_dwm}")

    monkeypatch.setattr("ray_dwm.orchestration.experiment.connect", connect)
    config = declare(shards, tmp_path)
    with pytest.raises(UserError, match="a cluster for 2, learning: True"):
        experiment(config, choose(config, [], []), parallel=2)


@pytest.mark.slow
def test_a_real_experiment_survives_a_failed_cell_and_repeats_itself(
    shards: dict[str, Path], driver: None, console: Console, tmp_path: Path
) -> None:
    stages = ("bilevel.stages=2", "bilevel.stage_updates=1")
    config = declare(shards, tmp_path, *stages)
    busy = config.folder / "tiny/dwm/seed-0"
    busy.mkdir(parents=True)
    with (busy / ".lock").open("a") as lock, Scraper(console.environment) as scraper:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as if another process trained it
        with pytest.raises(TrainingError, match=r"1 of 2 cells failed \(tiny/dwm/seed-0\)"):
            experiment(config, choose(config, ["dwm"], [0]))
    assert set(scraper.samples["ray_dwm_stage"].values()) == {2}
    done = {path: path.read_bytes() for path in config.folder.glob("tiny/*/*/metrics.jsonl")}
    assert len(done) == 1
    arguments = (*stages, f"storage={config.storage}", "--methods", "dwm", "--seeds", "0", "--parallel", "2")
    command = [sys.executable, "-m", "ray_dwm.cli", "experiment", str(tmp_path / "x.yaml"), *arguments]
    second = subprocess.run(
        command, env=console.environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 cells, 1 are done" in second.stdout and "tiny/dwm/seed-0 is done" in second.stdout
    assert {path: path.read_bytes() for path in done} == done
    assert "- two runs of tiny/dwm/seed-0: identical" in second.stdout.splitlines()
    content = json.loads((config.folder / "leaderboard.json").read_text())
    finals = [content["cells"][f"tiny/dwm/seed-0{end}"]["losses"] for end in ("", "-again")]
    assert finals[0] == finals[1] and finals[0].keys() == {"target", "test"}
    assert [row["method"] for row in content["rows"] if row["seeds"]] == ["dwm"]
