"""Lines of metrics.jsonl as series, without Ray."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from orchestration.conftest import wait_for
from synthetic import tiny_config

from ray_dwm.errors import Collapsed, DwmError, NotFinite, ResourceError, Stopped, TrainingError
from ray_dwm.orchestration import exporting
from ray_dwm.orchestration.exporting import RaySink, active, find
from ray_dwm.orchestration.series import BY_NAME, RANK, RUN, RUN_ID, SERIES


class Written(exporting.Exporter):
    """Keeps what would be exported."""

    def __init__(self, place: exporting.Place, *tags: str) -> None:
        super().__init__(place, *tags)
        self.values: dict[tuple[str, ...], list[float]] = {}

    def put(self, name: str, value: float, **tags: str) -> None:
        """Under the name and the tags' values."""
        assert tags.keys() == set(BY_NAME[name].tags)
        self.values.setdefault((name, *tags.values()), []).append(value)


def test_names_are_prometheus_names_and_counters_end_as_such() -> None:
    for series in SERIES:
        assert series.name.startswith(("lm_", "dwm_")) and series.name.replace("_", "").isalnum()
        assert (series.kind == "counter") == series.name.endswith("_total")
        assert bool(series.tags) == ("{" in series.key) or series.place == "driver"
        assert series.all_tags[0] == RUN


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("loss", ("lm_loss", {})),
        ("val/target/loss", ("lm_eval_loss", {"set": "target"})),
        ("seconds/dwm_wait", ("lm_phase_seconds_total", {"phase": "dwm_wait"})),
        ("weight/a/b", ("dwm_domain_weight", {"domain": "a/b"})),
        ("step_seconds/forward", None),
        ("bilevel/predicted_change", None),
    ],
)
def test_keys_find_their_series(key: str, expected: tuple[str, dict[str, str]] | None) -> None:
    found = find(key)
    assert (None if found is None else (found[0].name, found[1])) == expected


def test_a_line_is_exported_with_what_is_derived_from_it(shards: dict[str, Path], tmp_path: Path) -> None:
    config, exporter = tiny_config(shards, tmp_path), Written("rank 0", "run", "id", "0")
    sink = RaySink(config, exporter, lambda: 3)
    sink.log({"step": 0, "tokens": 0, "val/target/loss": 4.0})
    for step in (7, 8):  # of an attempt that continues after step 6
        sink.log(
            {"step": step, "tokens": step * 128, "loss": 3.0, "lr": math.nan, "dwm/ess": 4.5, "seconds/data": 0.25}
        )
    assert exporter.values["lm_tokens_total",] == [128, 128]
    assert exporter.values["dwm_ess_fraction",] == [0.5, 0.5]  # (4.5 - 1) / (8 - 1)
    assert exporter.values["lm_not_finite_total",] == [0, 1, 1]
    assert exporter.values["dwm_actor_queue",] == [3, 3, 3]
    assert exporter.values["lm_eval_loss", "target"] == [4.0]
    assert exporter.values["lm_phase_seconds_total", "data"] == [0.25, 0.25]
    assert len(exporter.values["lm_checkpoint_timestamp_seconds",]) == 1  # the start, where there is no checkpoint


def test_age_of_a_checkpoint_survives_a_restart(shards: dict[str, Path], tmp_path: Path) -> None:
    config, exporter = tiny_config(shards, tmp_path), Written("rank 0", "run", "id", "0")
    folder = config.run_dir / "checkpoints" / "step_000000003"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    RaySink(config, exporter, lambda: 0)
    assert exporter.values["lm_checkpoint_timestamp_seconds",] == [folder.stat().st_mtime]


Taken = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Name, value and tags of all that Ray is given."""
    found: Taken = []

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name, self._keys = name, tag_keys

        def take(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == set(self._keys)
            found.append((self._name, value, tags))

    class Gauge(Metric):
        set = Metric.take

    class Counter(Metric):
        inc = Metric.take

    monkeypatch.setattr(exporting, "Gauge", Gauge)
    monkeypatch.setattr(exporting, "Counter", Counter)
    return found


def test_a_gauge_is_set_anew_until_the_end(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_anew_s", lambda: 0.01)
    with exporting.Exporter("rank 0", "mine", "id", "0") as exporter:
        exporter.put("lm_tokens_total", 128)
        for value in (3.0, 2.0):
            exporter.put("lm_eval_loss", value, set="target")
        exporter.put("lm_eval_loss", 5.0, set="more")
        exporter.put("lm_loss", 1.0)
        exporter.put("lm_loss", math.nan)
        said = len(taken)
        wait_for(lambda: len(taken) > said + 4, "the gauges once more")
    ended = list(taken)
    assert {(name, value, tags.get("set")) for name, value, tags in ended[said:]} == {
        ("lm_eval_loss", 2.0, "target"),
        ("lm_eval_loss", 5.0, "more"),
    }
    assert not exporter._thread.is_alive() and taken == ended


@pytest.mark.parametrize(("interval_ms", "expected"), [(10000, 5.0), (1000, 0.5), (100, 0.5)])
def test_ray_has_passed_on_nothing_meanwhile(
    monkeypatch: pytest.MonkeyPatch, interval_ms: int, expected: float
) -> None:
    """It does so once a second at most."""
    monkeypatch.setattr(ray, "_config", SimpleNamespace(metrics_report_interval_ms=lambda: interval_ms))
    assert exporting._anew_s() == expected


def test_what_is_not_finite_and_counters_without_growth_are_left_out(taken: Taken) -> None:
    exporter = exporting.Exporter("rank 0", "mine", "id", "0")
    for value in (1.5, math.nan, math.inf):
        exporter.put("lm_loss", value)
    for tokens in (0, 128):
        exporter.put("lm_tokens_total", tokens)
    exporter.put("lm_eval_loss", 2.0, set="target")
    base = {RUN: "mine", RUN_ID: "id", RANK: "0"}
    assert taken == [
        ("lm_loss", 1.5, base),
        ("lm_tokens_total", 128, base),
        ("lm_eval_loss", 2.0, {**base, "set": "target"}),
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFinite("x"), "not_finite"),
        (Collapsed("x"), "collapsed"),
        (TrainingError("x"), "other"),
        (Stopped("x"), None),
        (ResourceError("x"), None),
    ],
)
def test_failed_runs_are_counted_by_kind(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: DwmError, kind: str | None
) -> None:
    written = Written("driver", "run")
    monkeypatch.setattr(exporting, "Exporter", lambda *tags: written)
    with pytest.raises(type(error)), active(tiny_config(shards, tmp_path)):
        assert written.values == {("lm_run_active",): [1]}
        raise error
    counted = {} if kind is None else {("lm_failures_total", kind): [1]}
    assert written.values == {("lm_run_active",): [1, 0], **counted}
