"""A run that chooses its own data in stages, on a real cluster: one run to look at, whatever interrupts it."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from orchestration.test_train import figures
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.data.stages import cut
from ray_dwm.engine.rundir import check, stop_path
from ray_dwm.errors import ConfigError, DataError, Stopped, UserError
from ray_dwm.orchestration import mates
from ray_dwm.orchestration.select import plan_selection, select
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.train import train

STEPS, STAGES = 16, 2
OPTIONS = (f"train.steps={STEPS}", "checkpoint.every=100", "train.eval_every=4", "data.selection=mates")
OPTIONS += (f"selection.mates.stages={STAGES}", "selection.mates.probes=24", "selection.mates.probe_targets=8")
OPTIONS += ("selection.mates.size=xs", "selection.block_tokens=640")


@pytest.fixture(scope="module")
def undisturbed(driver: None, shards: dict[str, Path], tmp_path_factory: Any) -> RunConfig:
    """A finished run of two stages under a DWM."""
    config = tiny_config(shards, tmp_path_factory.mktemp("undisturbed"), *OPTIONS, "name=undisturbed")
    with redirect_stdout(io.StringIO()) as out:
        train(config)
    assert "stage 1, steps 9 to 16: 64 of 128 sequences by mates; the influence model's Spearman" in out.getvalue()
    return config


def rows_of(config: RunConfig, stage: int) -> np.ndarray:
    return np.load(config.run_dir / "stages" / str(stage) / "rows.npy")


@pytest.mark.slow
def test_stages_are_one_run(undisturbed: RunConfig) -> None:
    folder, lines = undisturbed.run_dir, figures(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "mates/spearman" in line] == [9]
    assert lines[-1]["tokens"] == STEPS * 8 * 16
    rates = [line["lr"] for line in lines[1:]]
    assert all(b < a for a, b in itertools.pairwise(rates[2:])), "one schedule over all stages"
    versions = [line["dwm/version"] for line in lines[1:]]
    assert versions == sorted(versions) and versions[7] < versions[8] + 1 <= versions[-1]
    assert versions[-1] == 8 - 1  # every 2 steps from step 1 on, applied with a delay of 1, as without stages
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    assert (folder / "hf" / "model.safetensors").is_file()
    assert [path.name for path in sorted((folder / "stages").iterdir())] == ["0", "1"]


@pytest.mark.slow
def test_every_stage_trains_on_what_was_chosen_for_it(undisturbed: RunConfig) -> None:
    weights = pq.read_table(undisturbed.run_dir / "weights")
    ids, steps = (weights.column(name).to_numpy() for name in ("sample_id", "step"))
    pool = open_shards(undisturbed.data.train).sample_ids()
    for stage, (first, last) in enumerate([(1, 8), (9, 16)]):
        seen = ids[(steps >= first) & (steps <= last)]
        assert sorted(seen.tolist()) == sorted(pool[rows_of(undisturbed, stage)].tolist())
    assert not set(rows_of(undisturbed, 0)) & set(rows_of(undisturbed, 1)), "of parts of the pool of their own"
    record = json.loads((undisturbed.run_dir / "stages" / "1" / "selection.json").read_text())
    assert record["steps"] == [8, 16] and record["method"] == "mates" and record["chosen_before"] == 0
    assert record["sequences"] == {"pool": 128, "selected": 64}
    assert record["domains"]["good"]["tokens_selected"] + record["domains"]["noise"]["tokens_selected"] == 64 * 16
    assert record["notes"]["spearman"] == figures(undisturbed)[9]["mates/spearman"]


class Interrupted(RaySweep):
    """Is interrupted after two blocks."""

    def each(self, name: str, numbers: Sequence[int], function: Any, done: int = 0) -> None:
        """See RaySweep."""
        super().each(name, numbers[:2], function, done)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interruption_while_it_probes_leaves_no_trace(
    undisturbed: RunConfig,
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From where its first stage ended; what is trained then is the undisturbed run's own second stage."""
    monkeypatch.setattr(mates, "fit", lambda config, pool, figures: {"figures": figures})
    config = tiny_config(shards, tmp_path, *OPTIONS, "name=undisturbed", "selection.tasks=1")
    shutil.copytree(undisturbed.run_dir, config.run_dir)
    for later in ("stages/1", "checkpoints/step_000000016", "hf"):
        shutil.rmtree(config.run_dir / later)
    (config.run_dir / "summary.json").unlink()
    pool = load_manifest(config.data.train)
    with monkeypatch.context() as interrupting, pytest.raises(KeyboardInterrupt):
        interrupting.setattr(mates, "RaySweep", Interrupted)
        mates.fit_stages(config, pool)
    work = config.run_dir / "stages" / ".1.work"
    assert len(list(work.glob("influences-of-probes-*/*.npz"))) == 2
    given = mates.fit_stages(config, pool)["figures"]
    assert "8 blocks, 2 are there from before" in capsys.readouterr().out and not work.exists()
    for stage in range(STAGES):
        np.testing.assert_array_equal(rows_of(config, stage), rows_of(undisturbed, stage))
    assert given[9]["mates/spearman"] == figures(undisturbed)[9]["mates/spearman"]


@pytest.mark.slow
def test_the_choice_cannot_change_on_the_way(undisturbed: RunConfig, shards: dict[str, Path]) -> None:
    storage = undisturbed.run_dir.parent
    check(tiny_config(shards, storage, *OPTIONS, "name=undisturbed", "selection.tasks=5"))
    for change in ("selection.mates.probes=32", "selection.temperature=2", "selection.budget=1024"):
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            check(tiny_config(shards, storage, *OPTIONS, "name=undisturbed", change))


@pytest.mark.slow
def test_select_asks_a_finished_run(
    undisturbed: RunConfig, shards: dict[str, Path], driver: None, tmp_path: Path
) -> None:
    options = (*OPTIONS, f"selection.output={tmp_path / 'out'}", "selection.budget=1024")
    (tmp_path / "alone").symlink_to(undisturbed.run_dir / "hf")
    with pytest.raises(DataError, match=r"proxy LM .*/alone has no checkpoint beside it"):
        plan_selection(tiny_config(shards, tmp_path, *options, f"selection.proxy.folders={tmp_path / 'alone'}"))
    folder = select(tiny_config(shards, tmp_path, *options, f"selection.proxy.folders={undisturbed.run_dir}"))
    assert load_manifest(folder).rows == 64
    record = json.loads((folder / "selection.json").read_text())
    assert record["method"] == "mates" and record["notes"]["probes"] == 24
    assert len(record["scores"]["pool"]) > 1 and record["scores"]["selected"]["0.5"] > record["scores"]["pool"]["0.5"]


@pytest.mark.parametrize(
    ("newest", "there", "calls"),
    [
        (None, [], ["choose 0", "until 8", "choose 1", "end"]),
        (None, ["0"], ["until 8", "choose 1", "end"]),
        (5, ["0"], ["until 8", "choose 1", "end"]),
        (8, ["0"], ["choose 1", "end"]),
        (8, ["0", "1"], ["end"]),
        (11, ["0", "1"], ["end"]),
        (16, ["0", "1"], ["end"]),
    ],
)
def test_a_run_goes_on_where_it_was(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    newest: int | None,
    there: list[str],
    calls: list[str],
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS)
    pool, made, step = load_manifest(config.data.train), [], [newest]
    for number in there:
        (config.run_dir / "stages" / number).mkdir(parents=True)

    def chosen(config: RunConfig, task: Any, stage: Any) -> Any:
        made.append(f"choose {stage.number}")
        return np.arange(64), {"steps": [stage.first, stage.stop], "notes": {}, "sequences": SIZES, **NAMES}

    def trained(config: RunConfig, pool: Any, until: int, figures: Any) -> None:
        made.append(f"until {until}")
        step[0] = until

    monkeypatch.setattr(mates, "newest_step", lambda folder: step[0])
    monkeypatch.setattr(mates, "_chosen", chosen)
    monkeypatch.setattr(mates, "fit_until", trained)
    monkeypatch.setattr(mates, "_figures", lambda config: {})
    monkeypatch.setattr(mates, "fit", lambda config, pool, figures: made.append("end") or {"steps": 16})
    assert mates.fit_stages(config, pool) == {"steps": 16}
    assert made == calls
    assert (config.run_dir / "stages" / "1").is_dir()


SIZES, NAMES = {"pool": 128, "selected": 64}, {"method": "mates", "stage": 1}


def test_between_stages_a_run_that_is_to_stop_stops_and_one_that_lacks_its_rows_says_so(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS)
    pool, (_, second) = load_manifest(config.data.train), cut(STEPS, STAGES)
    config.run_dir.mkdir(parents=True)
    monkeypatch.setattr(mates, "newest_step", lambda folder: 12)
    with pytest.raises(
        DataError, match=r"stages/1, which says .*, is missing, and the newest checkpoint is of step 12"
    ):
        mates._choose(config, pool, second)
    stop_path(config).touch()
    with pytest.raises(Stopped, match="stopped at step 8, before the next: the same command continues"):
        mates._choose(config, pool, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.target="], "data.target is empty: selection by mates needs a target set"),
        (["selection.mates.stages=1"], "selection.mates.stages is 1: it must be at least 2"),
        (["selection.mates.stages=17"], "at most train.steps = 16"),
        (["selection.output=x"], "selection.output is of `ray-dwm select`"),
        (["selection.budget=15"], "selection.budget is 15 tokens, 0 sequences a stage"),
        (["selection.mates.probes=129"], "selection.mates.probes is 129, and there are 128 sequences"),
        (["selection.budget=112"], "selection.budget is 112 tokens, 7 sequences a stage: it must be at least"),
        (
            ["train.steps=40"],
            "takes 160 sequences, and has 128 of .*: set selection.mates.candidates=pool, use",
        ),
        (["train.steps=80"], "takes 320 sequences, and has 128 of the pool .* from: use a larger pool"),
        (["selection.budget=4112", "selection.mates.candidates=pool"], "takes 257 sequences, and has 256"),
    ],
)
def test_what_cannot_be_gone_through_is_one_line(
    shards: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    if "data.target=" in options:
        options = [*options, "weighting.method=uniform"]
    config = tiny_config(shards, tmp_path, *OPTIONS, *options)
    with pytest.raises(UserError, match=message) as raised:
        mates.check_stages(config, load_manifest(config.data.train))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("extra", [[], ["train.steps=40", "selection.mates.candidates=pool"], ["selection.budget=128"]])
def test_what_can_be_gone_through(shards: dict[str, Path], tmp_path: Path, extra: list[str]) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, *extra)
    pool = load_manifest(config.data.train)
    mates.check_stages(config, pool)
    parts = [mates._candidates(config, pool, stage) for stage in cut(config.train.steps, STAGES)]
    assert sorted(set(np.concatenate(parts).tolist())) == list(range(256))
