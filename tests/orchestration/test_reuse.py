"""Runs of another experiment: taken over where they are what a cell would compute, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from orchestration.test_experiment import Trainer, declare, given_dwms_fit  # noqa: F401

from ray_dwm.analysis.grid import record_path
from ray_dwm.config.experiment import Cell, ExperimentConfig
from ray_dwm.data.records import read_json
from ray_dwm.errors import UserError
from ray_dwm.orchestration.experiment import choose, experiment


def run(config: ExperimentConfig, reuse: Path | None = None) -> list[str]:
    """What of an experiment was run."""
    train = Trainer()
    experiment(config, choose(config, [], []), train=train, ready=lambda runs: "a device", reuse=reuse)
    return train.asked


@pytest.mark.slow
@pytest.mark.usefixtures("given_dwms_fit")
def test_what_is_configured_alike_is_copied(shards: dict[str, Path], tmp_path: Path) -> None:
    first = declare(shards, tmp_path)
    run(first)
    # Another seed, another method and another rate are run; so are the repetition and what needs another cell.
    other = declare(shards, tmp_path, "name=y", "seeds=0,7", "methods.more.set.bilevel.every=1")
    asked = run(other, reuse=first.folder)
    of_seed_0 = {name.split("/")[1] for name in asked if name.endswith("/seed-0")}
    assert of_seed_0 == {"frozen", "more"} and "tiny/dwm/seed-0-again" in asked
    assert {name for name in asked if name.endswith("/seed-7")} == {
        f"tiny/{method}/seed-7" for method in ("uniform", "frozen", "dwm", "more", "null-shuffled", "null-random")
    }
    ours, theirs = (config.folder / "tiny/dwm/seed-0" for config in (other, first))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    record = read_json(record_path(other.folder, Cell("tiny", "dwm", 0)))
    assert (record["state"], record["devices"], record["taken_from"]) == ("done", ["a device"], str(theirs))
    assert run(other, reuse=first.folder) == []


@pytest.mark.usefixtures("given_dwms_fit")
def test_another_configuration_takes_nothing(shards: dict[str, Path], tmp_path: Path) -> None:
    first = declare(shards, tmp_path, "seeds=0", "repeat=")
    run(first)
    assert len(run(declare(shards, tmp_path, "seeds=0", "repeat=", "name=y", "train.lr=0.5"), first.folder)) == 5


def test_a_folder_that_is_no_experiment_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)
    with pytest.raises(UserError, match="it is no experiment's folder"):
        run(config, reuse=tmp_path)
    assert not config.folder.exists()
