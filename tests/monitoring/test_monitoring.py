"""Rules, dashboard and scrape configuration against the table of what the code exports, and with Prometheus itself."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_dwm.config import RunConfig
from ray_dwm.orchestration.series import RAY_SERIES, RUN, SERIES, markdown_table

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "k8s" / "monitoring"
RULES = yaml.safe_load((FILES / "prometheus-rules.yaml").read_text())
DASHBOARD = json.loads((FILES / "grafana-dashboard.json").read_text())
TARGETS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
EXPRESSIONS = [*TARGETS, *(rule["expr"] for rule in ALERTS.values())]
RAY_LABELS = {"NodeAddress", "ray_train_controller_state"}
SCRAPED = {"namespace"}
"""Of the scrape, on Kubernetes alone."""

prometheus = pytest.mark.prometheus


def needs(tool: str) -> pytest.MarkDecorator:
    """Skips, visibly, where a tool is missing."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is missing: make monitoring-tools")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_is_exported_by_the_code(expression: str) -> None:
    bare = re.sub(r"\b(?:by|on|ignoring|group_left) \([^)]*\)|\{[^}]*\}", "", expression)
    used, ours = set(re.findall(r"\bray_\w+", bare)), {s.exported: s for s in SERIES}
    assert used and used <= ours.keys() | RAY_SERIES
    selectors = re.findall(r"(ray_\w+)\{([^}]*)\}", expression)
    for name, matchers in selectors:
        known = set(ours[name].all_tags) if name in ours else {RUN}
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= known, name
    grouped = {
        x.strip() for part in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression) for x in part.split(",")
    }
    tags = {tag for name in used if name in ours for tag in ours[name].all_tags}
    assert grouped <= tags | RAY_LABELS | SCRAPED | {RUN}


def test_the_dashboard_shows_every_series_and_is_whole() -> None:
    shown = " ".join(TARGETS)
    assert not [s.exported for s in SERIES if not re.search(rf"\b{s.exported}\b", shown)]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "TrainRunName"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels if panel["type"] != "row")
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)


def test_every_alert_is_explained() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert set(ALERTS) == {"RunStalled", "EssCollapsed", "FidelityLow", "NotFinite", "CheckpointTooOld", "RestartLoop"}
    section = text.split("## Alerts")[1]
    for name, rule in ALERTS.items():
        assert f"### {name}" in section
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"
    assert markdown_table() in text, "make the table anew: python -m ray_dwm.orchestration.series"


def test_the_ess_alert_comes_before_the_guard_ends_the_run() -> None:
    threshold = float(ALERTS["EssCollapsed"]["expr"].rsplit("<", 1)[1])
    assert threshold > RunConfig().dwm.min_ess_fraction


def test_the_operators_rules_are_the_same() -> None:
    wrapper = yaml.safe_load((FILES / "prometheusrule.yaml").read_text())
    assert wrapper["kind"] == "PrometheusRule" and wrapper["spec"] == RULES


@prometheus
@needs("promtool")
def test_promtool_is_content(tmp_path: Path) -> None:
    recorded = [{"record": f"panel_{n}", "expr": e.replace("$TrainRunName", "x")} for n, e in enumerate(TARGETS)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    for command in (
        ["check", "rules", FILES / "prometheus-rules.yaml", tmp_path / "panels.yaml"],
        ["check", "config", FILES / "prometheus.yaml"],
        ["test", "rules", Path(__file__).with_name("alerts.yaml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


class Exposition(BaseHTTPRequestHandler):
    """A node's agent: every series of the table, all growing."""

    def do_GET(self) -> None:
        """The exposition format."""
        lines = []
        for name in [*(s.exported for s in SERIES), *RAY_SERIES]:
            tags = next((s.all_tags for s in SERIES if s.exported == name), (RUN, *RAY_LABELS))
            labels = ",".join(f'{tag}="{"data" if tag == "phase" else "x"}"' for tag in tags)
            lines.append(f"{name}{{{labels}}} {time.time()}")
        body = "\n".join([*lines, ""]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Prometheus under the shipped configuration, but that it is in a hurry and finds one node in another place."""
    agent = HTTPServer(("127.0.0.1", 0), Exposition)
    threading.Thread(target=agent.serve_forever, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load((FILES / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(FILES / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(tmp_path / "nodes.json")]
    nodes = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{agent.server_port}"]}]
    (tmp_path / "nodes.json").write_text(json.dumps(nodes))
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
    ]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    agent.shutdown()


def ask(server: str, expression: str) -> list[Any]:
    """What Prometheus answers to an expression."""
    query = urllib.parse.urlencode({"query": expression.replace("$TrainRunName", ".*")})
    with urllib.request.urlopen(f"{server}/api/v1/query?{query}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    return list(found["data"]["result"])


@prometheus
@needs("prometheus")
def test_every_panel_shows_something(server: str) -> None:
    deadline, empty = time.monotonic() + 30, TARGETS
    while empty and time.monotonic() < deadline:  # a rate needs two looks
        time.sleep(0.5)
        with suppress(OSError):
            empty = [expression for expression in empty if not ask(server, expression)]
    assert not empty
    with urllib.request.urlopen(f"{server}/api/v1/rules", timeout=10) as answer:
        rules = json.load(answer)["data"]["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok")
