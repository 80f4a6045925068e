"""Proxy LMs of a selection: what is planned, what is refused, and what is trained once for all selections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lms import tiny_lm
from synthetic import tiny_config

from ray_dwm.config import RunConfig, load
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError, Stopped, TrainingError, UserError
from ray_dwm.orchestration import proxies
from ray_dwm.orchestration import select as selecting
from ray_dwm.orchestration.proxies import plan_proxies
from ray_dwm.orchestration.select import select


def test_lists_of_folders_may_be_written_as_yaml_or_with_commas(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("selection:\n  proxy:\n    folders: [a, b]\n")
    expected = ("a", "b")
    assert load([tmp_path / "c.yaml"]).selection.proxy.folders == expected
    assert load([], ["selection.proxy.folders=a,b"]).selection.proxy.folders == expected
    assert load([], ["selection.proxy.folders="]).selection.proxy.folders == ()


def test_names_say_what_a_proxy_is_trained_on_and_how(shards: dict[str, Path], tmp_path: Path) -> None:
    pool = load_manifest(shards["train"])

    def names(*overrides: str) -> list[str]:
        config = tiny_config(shards, tmp_path, "selection.proxy.count=2", *overrides)
        planned = plan_proxies(config, pool)
        runs = [proxy.run for proxy in planned if proxy.run is not None]
        assert [(run.weighting.method, run.data.order) for run in runs] == [("uniform", "shuffled")] * 2
        assert all(not run.evaluation.tasks for run in runs)
        return [proxy.folder.parent.name for proxy in planned]

    first = names()
    assert len(set(first)) == 2
    assert names("train.micro_batch=4", "name=other", "bilevel.every=7", "selection.budget=32") == first
    assert names("train.eval_every=2", "train.eval_sequences=8", "evaluation.tasks=x.jsonl") == first
    assert names("seed=1")[0] == first[1]
    for changed in ("selection.proxy.lr=1e-2", "selection.proxy.preset=tiny", "train.global_batch=16"):
        assert not set(names(changed)) & set(first)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "neither a finished run folder nor a Hugging Face folder"),
        ("vocabulary", "has vocab_size = 32, the pool .* has 64 token ids"),
        ("length", "has max_position_embeddings = 8, the pool .* has 16 tokens a sequence"),
        ("length of a GPT-2", "has n_positions = 8, the pool .* has 16 tokens a sequence"),
        ("tokenizer", "has another tokenizer than the pool"),
    ],
)
def test_named_folders_that_do_not_fit_are_refused(
    shards: dict[str, Path], tmp_path: Path, case: str, message: str
) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    if case != "nothing":
        tiny_lm(vocab=32 if case == "vocabulary" else 64).save_pretrained(folder)
    if case == "length":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 8}))
    if case == "length of a GPT-2":
        content = json.loads((folder / "config.json").read_text())
        del content["max_position_embeddings"]
        (folder / "config.json").write_text(json.dumps({**content, "n_positions": 8}))
    if case == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    config = tiny_config(shards, tmp_path, f"selection.proxy.folders={folder}")
    with pytest.raises(UserError, match=message) as raised:
        plan_proxies(config, load_manifest(shards["train"]))
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_named_folders_are_known_by_their_weights(shards: dict[str, Path], tmp_path: Path) -> None:
    tiny_lm(seed=0).save_pretrained(tmp_path / "a")
    tiny_lm(seed=1).save_pretrained(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "run" / "hf")
    named = [tmp_path / "a", tmp_path / "b", tmp_path / "run"]
    config = tiny_config(shards, tmp_path, f"selection.proxy.folders={','.join(map(str, named))}")
    a, b, run = plan_proxies(config, load_manifest(shards["train"]))
    assert a.digest == run.digest != b.digest
    assert run.folder == tmp_path / "run" / "hf"


def dsdm_config(shards: dict[str, Path], root: Path, *overrides: str) -> Any:
    """Forty sequences by DsDm, with a proxy of seconds."""
    options = ["data.selection=dsdm", "selection.budget=640", f"selection.output={root / 'out'}"]
    options += ["selection.block_tokens=800", "selection.dsdm.features=64", "selection.proxy.lr=3e-3"]
    return tiny_config(shards, root, *options, "selection.proxy.preset=tiny", "selection.proxy.steps=30", *overrides)


@pytest.mark.slow
def test_proxies_are_trained_once_for_all_selections(
    driver: None, shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = select(dsdm_config(shards, tmp_path))
    assert load_manifest(folder).domains["good"].rows == 40
    assert "[proxy-" in capsys.readouterr().out
    assert len(list((tmp_path / "proxies").glob("proxy-*/summary.json"))) == 1
    again = ["selection.tasks=1", "selection.block_tokens=1120", "selection.proxy.batch=5"]
    other = select(dsdm_config(shards, tmp_path, *again, f"selection.output={tmp_path / 'other'}"))
    assert "[proxy-" not in capsys.readouterr().out
    found = [open_shards(str(path)).sample_ids().tolist() for path in (folder, other)]
    assert len(set(found[0]) & set(found[1])) >= 39  # another batch rounds another way


@pytest.mark.parametrize(
    ("kind", "raised"), [("not_finite", DataError), ("stopped", Stopped), ("other", TrainingError)]
)
def test_a_proxy_that_does_not_get_ready_is_one_line_and_leaves_nothing(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    raised: type[Exception],
) -> None:
    def ending(config: RunConfig) -> None:
        error = TrainingError(f"[{config.name}] ended at step 3: lower train.lr")
        error.kind = kind
        raise error

    monkeypatch.setattr(proxies, "train", ending)
    monkeypatch.setattr(selecting, "connect", lambda config: None)  # nothing comes to be run on a cluster
    with pytest.raises(raised, match=r"^proxy LM \[proxy-.* step 3: lower selection\.proxy\.lr$") as found:
        select(dsdm_config(shards, tmp_path))
    assert type(found.value) is raised and not (tmp_path / "out").exists()
