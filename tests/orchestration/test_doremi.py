"""DoReMi end to end on a real cluster: two LMs, their game, and the pool resampled by what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gloo
import pyarrow.parquet as pq
import pytest
from synthetic import make_shards, tiny_config

from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.export import export_lm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build
from ray_dwm.errors import UserError
from ray_dwm.orchestration import doremi, fit
from ray_dwm.orchestration.proxies import Proxy
from ray_dwm.orchestration.select import plan_selection, select

ROWS = 60
OPTIONS = ("data.selection=doremi", f"selection.budget={ROWS * 16}", "selection.block_tokens=1600")
OPTIONS += ("selection.proxy.preset=tiny", "selection.proxy.steps=60", "selection.proxy.lr=1e-2", "train.eval_every=60")
OPTIONS += ("checkpoint.every=40", "weighting.group_dro.eta=0.1")


def config(shards: dict[str, Path], root: Path, *overrides: str) -> Any:
    return tiny_config(shards, root, *OPTIONS, f"selection.output={root / 'out'}", *overrides)


@pytest.mark.slow
def test_domain_weights_are_learnt_and_the_pool_resampled(
    shards: dict[str, Path],
    tmp_path: Path,
    driver: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fit, "create_actor", None)  # there is none where no DWM is learnt
    folder = select(config(shards, tmp_path))
    content = json.loads((folder / "domain_weights.json").read_text())
    weights, manifest = content["weights"], load_manifest(folder)
    assert sum(weights.values()) == pytest.approx(1) and weights["good"] > 0.6
    assert content["pool_shares"] == {"good": 120 / 256, "noise": 136 / 256}
    assert content["seed"] == 0 and content["steps"] == 60 and content["excess"].keys() == weights.keys()
    assert manifest.rows == ROWS
    assert {name: manifest.domains[name].rows for name in weights} == pytest.approx(
        {name: weight * ROWS for name, weight in weights.items()}, abs=1
    )
    proxy = Path(content["rounds"][0]["proxy"]).parent
    assert json.loads((proxy / "summary.json").read_text())["weighting"] == "group_dro"
    assert len(pq.read_table(proxy / "weights")) == 60 * 8 and not (proxy / "dwm").exists()
    # LMs that are there already, or ready weights: nothing is trained, and the rows are the same.
    capsys.readouterr()
    again = select(config(shards, tmp_path, f"selection.output={tmp_path / 'again'}"))
    file = folder / "domain_weights.json"
    ready = select(
        config(shards, tmp_path, f"selection.doremi.weights={file}", f"selection.output={tmp_path / 'ready'}")
    )
    assert "run folder" not in capsys.readouterr().out
    for other in (again, ready):
        assert (other / "part-00000.arrow").read_bytes() == (folder / "part-00000.arrow").read_bytes()
    assert json.loads((ready / "domain_weights.json").read_text())["weights"] == pytest.approx(weights)


def trained(run_config: Any) -> None:
    run_config.run_dir.mkdir(parents=True)
    parts = build(run_config)
    Trainer(parts).fit()
    export_lm(parts, check_data(run_config))


def in_this_process(proxies: tuple[Proxy, ...], pool: Manifest, sweep: object) -> None:
    """Stands for `ready_proxies`."""
    for proxy in proxies:
        if proxy.run is not None and not proxy.folder.exists():
            gloo.run(1, proxy.run.run_dir.parent, trained, proxy.run)


@pytest.mark.slow
def test_a_round_goes_on_from_the_weights_of_the_one_before(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doremi, "ready_proxies", in_this_process)
    pool = load_manifest(shards["train"])
    options = config(shards, tmp_path, "selection.doremi.rounds=2")
    weights = doremi.plan_domain_weights(options, pool).ready(pool, 250, None, tmp_path)  # type: ignore[arg-type]
    content = json.loads((tmp_path / "domain_weights.json").read_text())
    assert "the pool has fewer sequences than the domain weights ask for: good (120 of" in capsys.readouterr().out
    assert len(content["rounds"]) == 2 and content["rounds"][-1]["weights"] == content["weights"] == weights
    before = content["pool_shares"]
    for number, found in enumerate(content["rounds"]):
        last = read_metrics(Path(found["proxy"]).parent / "metrics.jsonl")[-1]
        assert found["weights"] == {name: last[f"group_dro/average/{name}"] for name in weights}
        assert found["largest_change"] == pytest.approx(abs(found["weights"]["good"] - before["good"]), abs=1e-9)
        if number:  # the reference LM was trained with the weights of the round before
            line = read_metrics(Path(found["reference"]).parent / "metrics.jsonl")[-1]
            assert {name: line[f"group_dro/alpha/{name}"] for name in weights} == pytest.approx(before, abs=1e-9)
        before = found["weights"]
    assert len({found[kind] for found in content["rounds"] for kind in ("reference", "proxy")}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["selection.stratified=true"], "selection.stratified keeps the domains' shares"),
        (["selection.proxy.count=2"], "selection.proxy names 2 LMs, doremi has one reference LM"),
        (["selection.doremi.weights={root}/w.json"], "has no weight for noise, a domain of"),
        (["weighting.group_dro.initial.web=1"], "initial: good has no weight"),
        (["data.train={root}/one"], "has one domain, good"),
        (["selection.proxy.folders={root}"], "is neither a finished run folder nor a Hugging Face folder"),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    shards: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "w.json").write_text('{"good": 1}')
    make_shards(tmp_path / "one", good=80, noise=0)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as raised:
        plan_selection(config(shards, tmp_path, *(option.format(root=tmp_path) for option in options)))
    assert "\n" not in str(raised.value) and sorted(tmp_path.iterdir()) == before


def test_what_the_weights_depend_on_names_the_selection(shards: dict[str, Path], tmp_path: Path) -> None:
    def name(*options: str) -> str:
        return plan_selection(config(shards, tmp_path, "selection.output=", *options)).folder.name

    first = name()
    assert first.startswith("doremi-")
    assert name("train.micro_batch=4", "cluster.workers=2", "bilevel.every=7", "weighting.method=uniform") == first
    for option in ("weighting.group_dro.eta=0.2", "selection.doremi.rounds=2", "selection.proxy.steps=61", "seed=1"):
        assert name(option) != first
