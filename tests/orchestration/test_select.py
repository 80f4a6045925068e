"""Selection as a job on a real cluster: any parallelism gives the same shards, and nothing is half-written."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from orchestration.conftest import PATIENCE_S, wait_for
from synthetic import make_shards, tiny_config

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.records import LOCK, locked
from ray_dwm.data.shards import ShardReader, open_shards
from ray_dwm.errors import DataError, Stopped, UserError
from ray_dwm.orchestration import select as selecting
from ray_dwm.orchestration.select import plan_selection, select, with_selection
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.write import write_rows
from ray_dwm.selection.method import Arrays, Task
from ray_dwm.selection.methods import score

pytestmark = pytest.mark.usefixtures("driver")

ROWS = 40


def config(shards: dict[str, Path], root: Path, *overrides: str) -> Any:
    """Forty sequences of sixteen tokens by DSIR on token ids, for the target set of Markov rows."""
    options = ("data.selection=dsir", "selection.dsir.features=tokens", f"selection.budget={ROWS * 16 + 7}")
    return tiny_config(
        shards, root, *options, f"selection.output={root / 'out'}", "selection.block_tokens=800", *overrides
    )


@pytest.fixture(scope="module")
def made(driver: None, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a selection, with its scores."""
    return select(config(shards, tmp_path_factory.mktemp("made"), "selection.keep_scores=true"))


def test_select_writes_shards_that_train_takes(shards: dict[str, Path], made: Path) -> None:
    manifest, record = load_manifest(made), json.loads((made / "selection.json").read_text())
    open_shards(str(made)).verify()
    assert manifest.rows == ROWS and manifest.domains["good"].rows >= 38
    pool = open_shards(str(shards["train"]))
    chosen = open_shards(str(made)).take(np.arange(ROWS))
    places = {int(key): row for row, key in enumerate(pool.sample_ids())}
    rows = np.array([places[int(key)] for key in chosen.sample_ids])
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(pool.take(rows).input_ids, chosen.input_ids)
    scores = pq.read_table(made / "scores.parquet")
    assert scores.column("sample_id").to_pylist() == pool.sample_ids().tolist()
    assert record["tokens"] == {"pool": 256 * 16, "selected": ROWS * 16}
    assert record["domains"]["good"]["tokens_selected"] == manifest.domains["good"].tokens
    selected = scores.column("score").to_numpy()[rows]
    assert record["scores"]["selected"]["0.5"] == pytest.approx(np.median(selected))
    assert record["folders"] == {
        "pool": str(shards["train"]),
        "targets": {"target": str(shards["target"])},
        "proxies": [],
    }
    assert [path.name for path in made.parent.iterdir()] == ["out"]


def test_the_same_command_again_and_another_one(
    shards: dict[str, Path], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, before = made.parent, (made / "manifest.json").read_bytes()
    assert select(config(shards, root, "selection.tasks=1")) == made
    assert "is there already" in capsys.readouterr().out
    seed = f"selection.seed={config(shards, root).seed}"
    assert select(config(shards, root, "seed=7", seed)) == made  # one for runs of several seeds
    with pytest.raises(UserError, match="exists already and is another selection"):
        select(config(shards, root, "seed=7"))
    with pytest.raises(UserError, match="exists already and is another selection"):
        select(config(shards, root, "selection.temperature=2"))
    assert (made / "manifest.json").read_bytes() == before


def test_those_that_want_the_same_selection_take_turns(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread in place of another process: a lock is a file descriptor's."""
    out, work = io.StringIO(), tmp_path / ".out.work"
    monkeypatch.setattr(sys, "stdout", out)
    work.mkdir()
    with ThreadPoolExecutor() as pool:
        with locked(work / LOCK, list):
            waiting = pool.submit(select, config(shards, tmp_path))
            told = f"another process is at work on {tmp_path / 'out'}: waiting for it"
            wait_for(lambda: told in out.getvalue(), "the word that it waits")
            assert not waiting.done()
        assert waiting.result(PATIENCE_S) == tmp_path / "out"
    assert "selection: " in out.getvalue()
    assert load_manifest(tmp_path / "out").rows == ROWS
    assert not work.exists()


def test_output_does_not_depend_on_tasks_and_blocks(shards: dict[str, Path], made: Path, tmp_path: Path) -> None:
    other = select(config(shards, tmp_path, "selection.tasks=1", "selection.block_tokens=112"))
    for name in ("manifest.json", "part-00000.arrow"):
        assert (other / name).read_bytes() == (made / name).read_bytes()


def test_another_budget_without_scoring_again(
    shards: dict[str, Path], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["selection.budget=1600", f"selection.output={tmp_path / 'more'}"]
    anew = select(config(shards, tmp_path, "selection.budget=1600", f"selection.output={tmp_path / 'anew'}"))
    capsys.readouterr()
    again = select(config(shards, tmp_path, *more, f"selection.scores={made / 'scores.parquet'}"))
    assert "scores by" not in capsys.readouterr().out
    assert (again / "part-00000.arrow").read_bytes() == (anew / "part-00000.arrow").read_bytes()
    other = ["seed=5", f"selection.output={tmp_path / 'other'}", f"selection.scores={made / 'scores.parquet'}"]
    with pytest.raises(DataError, match="are of another pool, target set, seed or method"):
        select(config(shards, tmp_path, *other))
    assert not (tmp_path / "other").exists()


def test_an_interruption_says_how_to_go_on(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(selecting, "_fill", interrupted)
    with pytest.raises(Stopped, match="out interrupted: the same command continues"):
        select(config(shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]


@pytest.mark.parametrize("kind", ["train", "target"])
def test_damage_is_not_written_anew_under_a_good_checksum(tmp_path: Path, kind: str) -> None:
    for seed, name in enumerate(("train", "target", "held_out")):
        make_shards(tmp_path / name, good=60, noise=60, seed=seed)
    path = tmp_path / kind / "part-1.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} differs from its checksum"):
        select(config({n: tmp_path / n for n in ("train", "target", "held_out")}, tmp_path))
    assert not (tmp_path / "out").exists()


def test_what_a_kill_at_the_end_leaves_harms_nothing(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the output's appearance and the removal of the work."""
    wanted, work = config(shards, tmp_path), tmp_path / ".out.work"
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        folder = select(wanted)
    assert (work / "parts" / "00000.json").exists()
    folder.rename(tmp_path / "elsewhere")
    select(wanted)
    open_shards(str(folder)).verify()
    assert (folder / "part-00000.arrow").read_bytes() == (tmp_path / "elsewhere" / "part-00000.arrow").read_bytes()
    work.mkdir()
    select(wanted)
    assert not work.exists()


def test_what_an_interrupted_run_with_other_options_leaves_is_not_in_the_output(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, task: Task) -> Iterator[Arrays]:
        yield next(iter(score(name, task)))
        raise KeyboardInterrupt

    with monkeypatch.context() as halting:
        halting.setattr("ray_dwm.orchestration.select.score", interrupted)
        with pytest.raises(Stopped):
            select(config(shards, tmp_path, "selection.keep_scores=true"))
    (tmp_path / ".out.work" / "shards" / ".selection.json.0.tmp").touch()
    folder = select(config(shards, tmp_path))
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "part-00000.arrow", "selection.json"}
    with pytest.raises(UserError, match="exists already, without scores: remove it"):
        select(config(shards, tmp_path, "selection.keep_scores=true"))


def test_parts_of_other_rows_are_written_anew(shards: dict[str, Path], tmp_path: Path) -> None:
    pool = load_manifest(shards["train"])
    (tmp_path / "shards").mkdir()
    for rows in ([1, 2, 3], [1, 2, 3], [250, 5]):
        files, domains = write_rows(np.array(rows), pool, RaySweep(tmp_path, SelectionConfig()), tmp_path)
        replace(pool, folder=tmp_path / "shards", files=files, domains=domains).write()
        found = ShardReader(load_manifest(tmp_path / "shards")).sample_ids()
        assert found.tolist() == open_shards(str(shards["train"])).take(np.array(rows)).sample_ids.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["selection.budget=4097"], "selection.budget is 4097 tokens, the pool .* has 4096: lower it"),
        (["selection.budget=15"], "it must be at least one sequence of 16"),
        (
            ["data.target=", "data.held_out={}"],
            "data.target is empty: selection by dsir needs a target set, name a .* .--target.",
        ),
        (["data.train="], "data.train is empty: name the pool"),
        (["data.selection=none"], "data.selection is none: name a method"),
        (["data.target=SMALL"], "small .set target. has 7 sequences: a selection needs at least 8"),
        (["data.target=FOREIGN"], "was made with tokenizer synthetic, .* another one: prepare both with the same"),
        (["selection.scores=nowhere.parquet"], "scores nowhere.parquet cannot be read"),
        (["selection.dsir.features=text"], "tokenizer holds no tokenizer.json"),
    ],
)
def test_bad_input_is_one_line(shards: dict[str, Path], tmp_path: Path, options: list[str], message: str) -> None:
    root = tmp_path / "data"
    make_shards(root / "small", good=7, noise=0, files=1)
    make_shards(root / "foreign", good=20, noise=0, tokenizer_sha256="1" * 64)
    given = [o.replace("SMALL", str(root / "small")).replace("FOREIGN", str(root / "foreign")) for o in options]
    with pytest.raises(UserError, match=message) as raised:
        select(config(shards, tmp_path / "out", *[o for o in given if "{}" not in o]))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() or not [p for p in (tmp_path / "out").iterdir() if p.name[0] != "."]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("selection.budget=48", "48 tokens, 3 sequences, and train.global_batch is 8: select more, or lower the batch"),
        ("lm.preset=huge", "lm.preset is 'huge'"),
        ("data.held_out.other=FOREIGN", "was made with tokenizer synthetic, .* another one"),
    ],
)
def test_what_is_wrong_with_a_run_is_told_before_it_selects(
    shards: dict[str, Path], tmp_path: Path, option: str, message: str
) -> None:
    make_shards(tmp_path / "foreign", good=20, noise=0, tokenizer_sha256="1" * 64)
    given = option.replace("FOREIGN", str(tmp_path / "foreign"))
    with pytest.raises(UserError, match=message):
        with_selection(config(shards, tmp_path / "out", "selection.output=", given))
    assert not (tmp_path / "out").exists()


def test_equal_scores_are_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    """A single bucket: pool and target have the same n-grams."""
    with pytest.raises(DataError, match="all 256 scores of dsir are 0"):
        select(config(shards, tmp_path, "selection.dsir.buckets=1"))
    assert not (tmp_path / "out").exists()


def test_inline_selections_are_shared_by_all_that_they_do_not_depend_on(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    inline = config(shards, tmp_path, "selection.output=")
    folder = plan_selection(inline).folder
    assert folder.parent == tmp_path / "selections" and folder.name.startswith("dsir-")
    same = ["selection.tasks=5", "name=b", "train.lr=1", "selection.keep_scores=true", "cluster.workers=2"]
    assert plan_selection(config(shards, tmp_path, "selection.output=", *same)).folder == folder
    for other in ("seed=1", "selection.budget=100", "selection.stratified=true", "selection.dsir.buckets=5"):
        assert plan_selection(config(shards, tmp_path, "selection.output=", other)).folder != folder
    selected = with_selection(inline)
    assert (selected.data.train, selected.data.selection) == (str(folder), "none")
    assert load_manifest(folder).rows == ROWS
