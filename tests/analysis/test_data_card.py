"""The data card says what the manifests, the recorded weights and the records of selections say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic_runs import STEPS, write_run
from test_report import outline

from ray_dwm.analysis.data_card import data_card, data_cards, passes
from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import open_run
from ray_dwm.data.manifest import load_manifest


def record(name: str, selected: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A record of a selection from 40 + 40 sequences of 16 tokens."""
    total = sum(selected)
    domains = {
        domain: {
            "tokens_pool": 640,
            "tokens_selected": 16 * count,
            "share_pool": 0.5,
            "share_selected": count / total,
            "mean_score": 0.0,
        }
        for domain, count in zip(("good", "noise"), selected, strict=True)
    }
    of_method = {"options": {name: {"words": 2}}, "notes": {}, "domains": domains}
    return {"method": name, "sequences": {"pool": 80, "selected": total}, **of_method, **more}


def test_sets_domains_and_origin(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "d", method="dwm", final=2.0)
    train = load_manifest(tmp_path / "shards" / "train")
    replace(
        train, made_by={"command": "prepare", "sources": [f"{k}.jsonl" for k in range(14)], "documents": 1234}
    ).write()
    card = data_card(open_run(folder))
    sets = {one.name: one for one in card["sets"]}
    assert [(one.name, one.role) for one in card["sets"]] == [
        ("train", "trained on"),
        ("target", "target set"),
        ("test", "held out, only evaluated"),
    ]
    facts = dict(sets["train"].facts)
    assert facts["size"] == "80 sequences of 16 tokens, 1,280 tokens in all" and facts["read"] == "the run: 1.00 epochs"
    assert facts["sources"].endswith("11.jsonl and 2 more") and facts["documents"] == "1,234"
    assert facts["licence"] == "none is recorded in the manifest"
    # Sample i of a batch of 8 has weight (2 i + 1) / 8, and odd ones are noise: 28 / 64 of the weight, 36 / 64.
    assert sets["train"].domains is not None and sets["train"].domains.rows == (
        ("good", "40", "640", "50.0%", "1.00", "50.0%", "43.8%"),
        ("noise", "40", "640", "50.0%", "1.00", "50.0%", "56.2%"),
    )
    assert sets["train"].state.startswith("its shards have been changed") and sets["target"].state == ""
    assert card["selection"] is None and card["stages"] == []


def test_shards_that_are_gone_are_said_to_be(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "u", method="uniform", final=3.0)
    (tmp_path / "shards" / "train").rename(tmp_path / "elsewhere")
    run = open_run(folder)
    card = data_card(run)
    assert card["sets"][0].state == "its shards are not where they were" and passes(run) == []
    write_report([folder], tmp_path / "r.html")
    assert "Its shards are not where they were." in (tmp_path / "r.html").read_text()


def test_what_a_selection_did(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "u", method="uniform", final=3.0)
    (tmp_path / "shards" / "train" / "selection.json").write_text(json.dumps(record("dsir", (30, 10))))
    found = data_card(open_run(folder))["selection"]
    assert found["told"] == "dsir took 40 of 80 sequences" and found["options"] == {"words": 2}
    assert found["table"].rows[0] == ("good", "640", "50.0%", "480", "75.0%", "75.0%")
    write_report([folder], tmp_path / "r.html")
    assert "What selecting did to each domain" in outline(tmp_path / "r.html").headings


def test_stages_of_a_run_that_chooses_its_own_data(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "u", "data.selection=mates", "selection.mates.stages=2", method="uniform", final=3.0)
    judged = {"spearman": 0.25, "r2": 0.0625, "judged": 10, "probes": 40}
    for stage, (method, selected, notes) in enumerate([("random", (20, 20), {}), ("mates", (15, 5), judged)]):
        place = folder / "stages" / str(stage)
        place.mkdir(parents=True)
        steps = [stage * STEPS // 2, (stage + 1) * STEPS // 2]
        more = {"stage": stage, "steps": steps, "chosen_before": 7 * stage, "seconds": 1.6}
        (place / "selection.json").write_text(json.dumps(record(method, selected, **more) | {"notes": notes}))
    run = open_run(folder)
    how, shares = data_card(run)["stages"]
    assert how.rows == (
        ("0", "random", "1 to 5", "40", "80", "0", "", "", "2"),
        ("1", "mates", "6 to 10", "20", "80", "7", "0.25", "0.06", "2"),
    )
    assert shares.rows == (("good", "50.0%", "50.0%", "75.0%"), ("noise", "50.0%", "50.0%", "25.0%"))
    assert passes(run) == [("stage 0", 1.0), ("stage 1", 2.0)]
    plain = open_run(write_run(tmp_path, "plain", method="uniform", final=3.0))
    cards = data_cards([plain, open_run(folder), plain])
    assert [(card["run"], [one.name for one in card["sets"]]) for card in cards] == [
        ("plain", ["train", "target", "test"]),
        ("u", ["train"]),
    ]
    write_report([folder], tmp_path / "r.html")
    assert {"Stages", "Share of each domain"} <= set(outline(tmp_path / "r.html").headings)
    assert "Stage 1 read its sequences 2.00 times" in (tmp_path / "r.html").read_text()
