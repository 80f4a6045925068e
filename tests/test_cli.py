"""Wrong input at the console: exit code 2, one line that names the culprit, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from synthetic import make_shards, tiny_config

from ray_dwm.cli import main
from ray_dwm.config import to_yaml
from ray_dwm.data.manifest import file_sha256


def console(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of `ray-dwm <arguments>` in this process."""
    monkeypatch.setattr(sys, "argv", ["ray-dwm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def own_shards(tmp_path: Path) -> dict[str, Path]:
    """Sets that a test may spoil."""
    root = tmp_path / "shards"
    make_shards(root / "train", good=40, noise=40, seed=1)
    make_shards(root / "target", good=24, noise=0, seed=2, files=1)
    make_shards(root / "held_out", good=16, noise=0, seed=3, files=1)
    return {path.name: path for path in root.iterdir()}


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.arrow"))[0]


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    path = first_shard(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_foreign_file(folder: Path) -> None:
    """An Arrow file of other columns, to which the manifest was adapted."""
    path = first_shard(folder)
    table = pa.table({"a": [1, 2, 3]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    edit_manifest(folder, bytes=path.stat().st_size, sha256=file_sha256(path))


def edit_manifest(folder: Path, top: dict[str, object] | None = None, **first_file: object) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][0] |= first_file
    path.write_text(json.dumps({**content, **(top or {})}))


def empty_domain(folder: Path) -> None:
    empty = {"rows": 0, "tokens": 0, "bytes_per_token": 1.0}
    content = json.loads((folder / "manifest.json").read_text())
    edit_manifest(folder, {"domains": {**content["domains"], "void": empty}})


Spoil = Callable[[dict[str, Path]], None]
SPOILED: list[tuple[str, Spoil, str]] = [
    ("missing folder", lambda s: shutil.rmtree(s["train"]), "holds no manifest.json"),
    ("missing shard", lambda s: first_shard(s["train"]).unlink(), "part-0.arrow is missing"),
    ("truncated shard", lambda s: truncate(s["train"]), "part-0.arrow has"),
    ("bit-flipped shard", lambda s: flip_a_bit(s["target"]), "part-0.arrow differs from its checksum"),
    ("foreign shard", lambda s: replace_by_foreign_file(s["train"]), "part-0.arrow is no readable token shard"),
    ("wrong rows", lambda s: edit_manifest(s["train"], rows=39), "part-0.arrow has 40 rows"),
    ("wrong seq_len", lambda s: edit_manifest(s["train"], {"seq_len": 8}), "rows of 16 tokens"),
    ("damaged manifest", lambda s: (s["train"] / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ("tokenizer", lambda s: edit_manifest(s["target"], {"tokenizer_sha256": "f" * 64}), "another one"),
    ("empty domain", lambda s: empty_domain(s["train"]), "domain void is empty"),
]


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in SPOILED], ids=[row[0] for row in SPOILED])
def test_spoiled_shards(
    own_shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    message: str,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny_config(own_shards, tmp_path / "runs")))
    spoil(own_shards)
    assert console(monkeypatch, "train", "--config", file) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "runs").exists()


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "did you mean train.steps?"),
        ("trian.steps=5", "did you mean train?"),
        ("train.steps=many", "train.steps is 'many': it must be of type int"),
        ("dwm.lm_features=perhaps", "dwm.lm_features is 'perhaps': it must be true or false"),
        ("weighting.method=dataflex", "weighting.method is 'dataflex': it must be one of dwm, uniform, loss"),
        ("dwm.enabled=false", "unknown configuration key dwm.enabled"),
        ("bilevel.every=-1", "bilevel.every is -1"),
        ("bilevel.estimator=ghost", "set bilevel.target_at=theta, or use ghost_lowrank"),
        ("train.optimizer=sgd", "set bilevel.estimator to one_sided or central"),
        ("bilevel.fraction=0.3", "bilevel.fraction is 0.3: with train.global_batch = 8 it must be one of 1, 0.5, 0.25"),
        ("bilevel.target_weights.code=2", "there is no such target set, they are target"),
        ("bilevel.target_weights.target=0", "bilevel.target_weights are all 0"),
        ("bilevel.target_weights.target=much", "bilevel.target_weights.target is 'much': it must be of type float"),
        ("bilevel.stages=3", "leaves 1 steps a stage, too few for bilevel.stage_updates = 10"),
        ("data.more_targets.test=x", "both have a set named test"),
        ("data.more_targets.code=/nowhere", "holds no manifest.json"),
        ("dwm.mode=frozen", "dwm.mode=frozen needs dwm.init_from"),
        ("dwm.mode=replay", "dwm.mode=replay needs dwm.trajectory"),
        ("dwm.init_from=/nowhere", "not a readable DWM folder"),
        ("train.lr=nan", "train.lr is 'nan': not finite"),
        ("cluster.workers=2,1", "cluster.workers is [2, 1]: the first number is the least"),
        ("cluster.workers=1,9", "cluster.workers is 9, train.global_batch 8"),
        ("lm.preset=8b", "lm.preset is '8b'"),
        ("lm.seq_len=32", "lm.seq_len is 32"),
        ("bilevel.target_sequences=4", "has 4 sequences, bilevel.target_batch asks for 8"),
        ("bilevel.target_batch=32", "lower it or prepare a larger target set"),
        ("data.target=", "data.target is empty: weighting.method=dwm needs a target set"),
        ("weighting.method=joint_update_aware", "weighting.anchor_sequences asks for 32: lower it or prepare a larger"),
        ("train.global_batch=128", "fewer than a global batch of 128"),
        ("nonsense", "is not of the form key=value"),
        ("name=..", "name is '..'"),
        ("name=" + "x" * 300, "at most 128"),
        ("storage=s3://bucket/runs", "runs are written to a folder, not to an address"),
        ("data.held_out.x=s3://bucket/x", "data.held_out.x is 's3://bucket/x': shards are read from a folder"),
        ("cluster.free_within_s=0", "cluster.free_within_s is 0.0: it must be greater than 0"),
        ("storage=", "storage is empty"),
        ("seed=-1", "seed is -1"),
        ("data.held_out.target=x", "a set named 'target'"),
        ("cluster.gpus_per_worker=-1", "cluster.gpus_per_worker is -1"),
        ("cluster.max_failures=-2", "cluster.max_failures is -2"),
        ("train.clip_norm=-1", "train.clip_norm is -1"),
        ("lm.seq_len=1", "lm.seq_len is 1"),
    ],
)
def test_wrong_configuration(
    own_shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny_config(own_shards, tmp_path / "runs")))
    assert console(monkeypatch, "train", "--config", file, override) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "runs").exists()


def test_run_folder_of_another_configuration(
    own_shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(own_shards, tmp_path / "runs")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert console(monkeypatch, "train", "--config", file, "train.lr=0.5") == 2
    assert_one_line(capsys, "train.lr = 0.003, now it is 0.5")
    assert (config.run_dir / "config.yaml").read_text() == to_yaml(config)


def test_storage_that_cannot_be_written(
    own_shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs").write_text("a file")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny_config(own_shards, tmp_path / "runs")))
    assert console(monkeypatch, "train", "--config", file) == 2
    assert_one_line(capsys, "choose another storage=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train"], "data.train is empty"),
        (["compare", "weighting.method=uniform"], "compared with itself"),
        (["prepare"], "nothing to prepare"),
        (["prepare", "prepare.train=nowhere", "data.train=out"], "no text files there"),
        (["evaluate", "nowhere", "nowhere"], "neither a finished run folder nor a Hugging Face folder"),
        (["export", "nowhere", "out"], "no finished run folder"),
        (["analyze", "nowhere"], "no finished run folder"),
        (["analyze", "nowhere", "--output", "."], "name a file in a folder that exists"),
        (["select", "dsri"], "there is no method 'dsri': it must be one of random, dsir"),
        (["select", "none"], "there is no method 'none'"),
        (["select", "dsir"], "name the pool, a folder of token shards (--pool)"),
        (["select", "dsir", "--pool", "nowhere", *["--target", "x"] * 3], "nowhere holds no manifest.json"),
        (["score", "--dwm", "nowhere", "--pool", "nowhere", "--output", "s.parquet"], "holds no manifest.json"),
        (["select", "random", "--pool", "no where/", "--budget", "5"], "no where holds no manifest.json"),
        (["select", "random", "--budget", "all"], "selection.budget is 'all': it must be of type int"),
        (["evaluate", "nowhere", "nowhere", "--output", "no/where.json"], "name a file in a folder that exists"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert console(monkeypatch, *arguments) == 2
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []
