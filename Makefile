# make quickstart | test | test-slow | checks | bench | k8s: each creates its own .venv first, nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow test-ray test-others checks bench selection-table dashboards optuna-dashboard tensorboard k8s monitoring-tools install clean

install: $(STAMP)

# torch goes first and pinned: resolved together with the rest, pip may prefer a newer build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,oracle,eval,tune]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/ray-dwm compare --config configs/quickstart.yaml

# Side by side: alone, either leaves one core idle half of the time.
test: WHICH := not slow
test-slow: WHICH := slow
test test-slow: $(STAMP)
	@$(MAKE) --no-print-directory -j2 --output-sync test-ray test-others WHICH="$(WHICH)"

test-ray: $(STAMP)
	$(BIN)/python -m pytest tests/orchestration -m "$(WHICH)"

test-others: $(STAMP)
	$(BIN)/python -m pytest --ignore=tests/orchestration -m "$(WHICH)"

checks: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Not in bench, for their time and Ray: benchmarks/ingest.py (about 5 minutes and 11 GB of disk).
bench: $(STAMP)
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/bilevel.py
	$(BIN)/python benchmarks/memory_model.py

# Resumes; hours on two cores. The table is runs/main/leaderboard.md.
selection-table: $(STAMP)
	$(BIN)/ray-dwm experiment configs/experiments/main.yaml --parallel 2

# What a sweep does, live; docs/tune.md. Another one: make dashboards SWEEP=runs/mine
SWEEP ?= runs/tune-quickstart

dashboards: $(VENV)/.dashboards
	@$(MAKE) --no-print-directory -j2 optuna-dashboard tensorboard

optuna-dashboard: $(VENV)/.dashboards
	$(BIN)/optuna-dashboard --host 127.0.0.1 --port 8080 sqlite:///$(SWEEP)/study.db

tensorboard: $(VENV)/.dashboards
	$(BIN)/tensorboard --host 127.0.0.1 --port 6006 --logdir $(SWEEP)/tune

$(VENV)/.dashboards: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[dashboards]'
	@touch $@

# Needs kubectl. A test compares what is committed with the sources, by their digests where there is no kubectl.
RENDERED := k8s/rendered
k8s:
	@command -v kubectl > /dev/null || { echo "kubectl is needed to render the manifests: install it, or use $(RENDERED)/"; exit 2; }
	rm -rf $(RENDERED) && mkdir $(RENDERED)
	set -e; for overlay in k8s/overlays/*; do kubectl kustomize $$overlay > $(RENDERED)/$${overlay##*/}.yaml; done
	find k8s -name '*.yaml' -not -path '$(RENDERED)/*' -o -path 'k8s/monitoring/*.json' | LC_ALL=C sort | xargs sha256sum > $(RENDERED)/SOURCES.sha256

# Prometheus and promtool, which the tests marked `prometheus` need; on Debian and Ubuntu.
monitoring-tools:
	@command -v apt-get > /dev/null || { echo "apt-get is needed: install prometheus by other means"; exit 2; }
	@if command -v promtool; then true; else apt-get update && apt-get install -y --no-install-recommends prometheus; fi

clean:
	rm -rf $(VENV) build *.egg-info
