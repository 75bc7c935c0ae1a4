# Needs Python 3.11 to 3.13 and make, nothing else: every target installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test soak check format bench bench-retention clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Run a real Astrocyte brain on an embedded Postgres, and show the rows
	@$(BIN)/astrocyte-otel-audit demo

test: $(VENV)/.dev ## Run all tests, on an embedded Postgres or the server of OTEL_ASTROCYTE_AUDIT_TEST_DSN
	$(BIN)/python -m pytest

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: the demo waits for what it needs and no more.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
