"""Who may write into a run folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import make_shards, tiny_config

from ray_dwm.config import load, to_yaml
from ray_dwm.engine.rundir import check, claim, raise_failure, record_failure
from ray_dwm.errors import ConfigError, DataError, NotFinite, TrainingError, UserError

HOLD = """
import sys
from ray_dwm.config import load
from ray_dwm.engine.rundir import claim
with claim(load([sys.argv[1]])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("change", ["train.lr=1", "dwm.size=m", "seed=4", "bilevel.kl=0.5"])
def test_another_result_needs_another_folder(shards: dict[str, Path], tmp_path: Path, change: str) -> None:
    with claim(tiny_config(shards, tmp_path)):
        pass
    with pytest.raises(ConfigError, match="was made with " + change.split("=")[0]):
        check(tiny_config(shards, tmp_path, change))


@pytest.mark.parametrize("change", ["cluster.max_failures=9", "tracking.project=x", "checkpoint.keep=5"])
def test_where_and_how_it_runs_may_change(shards: dict[str, Path], tmp_path: Path, change: str) -> None:
    with claim(tiny_config(shards, tmp_path)):
        pass
    changed = tiny_config(shards, tmp_path, change)
    check(changed)
    with claim(changed):
        assert load([changed.run_dir / "config.yaml"]) == changed


def test_a_second_process_is_kept_out_until_the_first_is_gone(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "c.yaml")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="in use by another process"), claim(config):
        pass
    holder.kill()
    holder.wait()
    with claim(config):
        pass


def test_the_first_failure_is_the_one_that_is_told(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path)
    with claim(config):
        record_failure(config, NotFinite("first"), where="rank 1")
        record_failure(config, TrainingError("second"))
        with pytest.raises(TrainingError, match=r"^first \(rank 1\)$") as raised:
            raise_failure(config)
        assert raised.value.kind == "not_finite"
    with claim(config):  # a new attempt starts without it
        raise_failure(config)


def test_shards_that_changed_under_a_run_are_refused(tmp_path: Path) -> None:
    folders = {name: tmp_path / "shards" / name for name in ("train", "target", "held_out")}
    for folder in folders.values():
        make_shards(folder, good=16, noise=16)
    config = tiny_config(folders, tmp_path)
    with claim(config):
        pass
    check(config)
    shutil.rmtree(folders["target"])
    make_shards(folders["target"], good=20, noise=12)
    with pytest.raises(DataError, match="the shards of target are not those"):
        check(config)


def test_sets_may_lie_elsewhere_but_not_be_others(shards: dict[str, Path], tmp_path: Path) -> None:
    with claim(tiny_config(shards, tmp_path)):
        pass
    moved = {name: Path(shutil.copytree(folder, tmp_path / "moved" / name)) for name, folder in shards.items()}
    with claim(tiny_config(moved, tmp_path)):
        pass
    with pytest.raises(DataError, match="the shards of test are not those"):
        check(tiny_config({**moved, "held_out": moved["target"]}, tmp_path))
    with pytest.raises(ConfigError, match=r"was made with data\.held_out\.more = None"):
        check(tiny_config(shards, tmp_path, f"data.held_out.more={shards['target']}"))
