PYTHON ?= python3
PYTEST_ARGS ?=
# When to stop building the test cluster's programs (seconds since 1970); options of `make cluster`.
BUILD_UNTIL ?=
CLUSTER_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.posttrain-setup
# Everything that `make generate` writes, and nothing else.
GENERATED := charts/posttrain/values.schema.json crds docs/reasons.md docs/rewards.md docs/settings.md \
  docs/trainingrun.md operator/posttrain/api/tables $(wildcard images/*/requirements*.txt)

LOCK_ONLY := --no-dev --no-emit-project --format requirements.txt
EXPORT_VLLM := $(VENV)/bin/uv export --locked --project images/vllm --no-emit-package posttrain $(LOCK_ONLY)
# PyPI's builds of these do not load without CUDA's libraries, and text needs none of them.
CUDA_ONLY := torchaudio torchcodec torchvision

# What the test cluster's programs are built for, in this order.
BUILDS := build-control-plane build-node build-kueue

# The tests on clusters, which wait a lot, run beside the others. PYTEST_ARGS="-n0 -s" shows what they print.
BESIDE_EACH_OTHER := -n 2

export UV_COMPILE_BYTECODE := 1
export UV_PYTHON_DOWNLOADS := never

.DEFAULT_GOAL := help
.PHONY: help setup check test test-unit test-workloads test-all integration e2e generate verify quickstart \
  chaos cluster \
  cluster-down cluster-binaries cluster-packages cluster-parts $(BUILDS) clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the posttrain command and the development tools

# uv comes by pip first, in the version that uv.lock names; from then on the lock rules all of .venv.
$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or newer, and %s is older: make setup PYTHON=python3.12" % sys.executable)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "uv==$$(awk '/^name = "uv"$$/ {getline; gsub(/[^0-9.]/, ""); print}' uv.lock)"
	$(VENV)/bin/uv sync --locked --extra cli --extra operator
	@touch $@

check: setup ## Lint, formatting, types, import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: setup build-control-plane ## Run the tests, but for those of `make e2e` (PYTEST_ARGS="-k name" for some)
	$(VENV)/bin/pytest $(BESIDE_EACH_OTHER) -m "not e2e and not kueue" $(PYTEST_ARGS)

test-unit: setup ## Run the tests that need neither the trainer environment nor the test cluster
	$(VENV)/bin/pytest $(BESIDE_EACH_OTHER) -m "not workloads and not integration and not e2e and not kueue" $(PYTEST_ARGS)

test-workloads: setup ## Run the tests in the trainer environment
	$(VENV)/bin/pytest -m workloads $(PYTEST_ARGS)

integration: setup build-control-plane ## Run the tests against a real control plane with nodes that are played
	$(VENV)/bin/pytest -m integration $(PYTEST_ARGS)

e2e: setup $(BUILDS) ## Run the tests on a real node, and those with Kueue
	$(VENV)/bin/pytest -m "e2e or kueue" $(PYTEST_ARGS)

test-all: setup $(BUILDS) ## Run every test
	$(VENV)/bin/pytest $(BESIDE_EACH_OTHER) $(PYTEST_ARGS)

chaos: setup build-control-plane ## Kill the operator at 300 random writes of runs' lives (half an hour); see docs/development/chaos.md
	POSTTRAIN_CHAOS_TRIALS=$${POSTTRAIN_CHAOS_TRIALS:-300} $(VENV)/bin/pytest -q -s tests/integration/test_chaos.py $(PYTEST_ARGS)

generate: setup ## Write the generated files anew: locks of the images, argument tables, CRDs, schemas, reference pages
	@for image in operator sandbox trainer; do \
	  $(VENV)/bin/uv export --locked --extra $$image $(LOCK_ONLY) -o images/$$image/requirements.txt >/dev/null || exit 1; \
	done
	@$(EXPORT_VLLM) --extra gpu -o images/vllm/requirements.txt >/dev/null
	@$(EXPORT_VLLM) --extra cpu $(CUDA_ONLY:%=--no-emit-package %) -o images/vllm/requirements-cpu.txt >/dev/null
	$(PY) scripts/generate_tables.py
	$(PY) -m posttrain.crds
	$(PY) scripts/generate_chart.py

verify: generate ## Fail if a generated file differs from the committed one
	git diff --exit-code -- $(GENERATED)
	@new="$$(git ls-files --others --exclude-standard -- $(GENERATED))"; \
	  [ -z "$$new" ] || { echo "generated, but not committed:"; echo "$$new"; exit 1; }

quickstart: setup ## Fine-tune a small real model on this machine
	$(PY) examples/quickstart/make_inputs.py
	$(VENV)/bin/posttrain run examples/quickstart/trainingrun.yaml

cluster: setup build-control-plane $(if $(findstring fake,$(CLUSTER_ARGS)),,build-node) ## Start a test cluster in the background, to try things on
	$(PY) -m tests.cluster up $(CLUSTER_ARGS)

cluster-down: setup ## Stop it
	$(PY) -m tests.cluster down

cluster-binaries: $(BUILDS) ## Build the test cluster's programs into the cache (Go; the first time half an hour)

$(BUILDS): build-%: setup
	@$(PY) -m tests.cluster.build $(if $(BUILD_UNTIL),--until $(BUILD_UNTIL)) $*

cluster-packages: setup ## Install the Debian packages that a real node needs (root)
	@packages="$$($(PY) -m tests.cluster packages)"; [ -z "$$packages" ] || { apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$packages; }

cluster-parts: setup ## Print the parts of the test cluster that can be run here
	@$(PY) -m tests.cluster parts

clean: ## Remove .venv, caches and builds; runs under .posttrain stay
	rm -rf $(VENV) dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.posttrain -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
