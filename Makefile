# Everything that a newcomer or a build server runs. `make` alone says what there is.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKED := aiotracker tests benchmarks docs
# Of the tests; e.g. make test TESTS=tests/core PYTEST_ARGS=-x
TESTS := tests
WORKERS := 3
PYTEST_ARGS :=

.DEFAULT_GOAL := help
.PHONY: help install demo test services lint docs bench report matrix chaos mutants clean

help: ## What there is.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Makes .venv with the package, all extras, and all tools.

$(INSTALLED): pyproject.toml
	@set -eu; \
	if [ ! -x $(BIN)/python ]; then \
		python=; \
		for name in python3 python3.14 python3.13 python3.12 python3.11; do \
			if command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
				python=$$name; break; \
			fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "Python 3.11 or newer is needed, and neither python3 nor python3.11 to python3.14 is that." >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; \
		if ! $$python -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "$$python has no working venv; on Debian and Ubuntu: apt install $$python-venv" >&2; \
			exit 1; \
		fi; \
	fi
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@

demo: $(INSTALLED) ## Tracks a real job, kills it in the middle, starts it again.
	@$(BIN)/python docs/demo.py

test: lint services ## Linters, types, and all tests but the long ones.
	$(BIN)/python -m pytest -m 'not chaos' -n $(WORKERS) --dist loadscope $(PYTEST_ARGS) $(TESTS)

services: ## Installs the servers that tests start, where this machine lets us; tests skip what is missing, but not on CI.
	@$(foreach script,$(wildcard tests/services/install.sh),bash $(script))

lint: $(INSTALLED) ## Linters, format and types alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

docs: $(INSTALLED) ## Builds the documentation into build/docs; a warning is an error.
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs-read docs build/docs
	@echo "build/docs/index.html"

bench: $(INSTALLED) ## Compares with other libraries on this machine, and fails below the figures to reach.
	$(BIN)/python -m benchmarks compare file --check
	$(BIN)/python -m benchmarks scale file --check
	$(BIN)/python -m benchmarks query --check

report: $(INSTALLED) ## Measures everything, and writes docs/reference/performance.md; takes half an hour.
	$(BIN)/python -m benchmarks report

matrix: $(INSTALLED) ## The built package on Python 3.11 to 3.13, with the lowest dependencies, and on uvloop.
	$(BIN)/python -m tests.packaging.matrix

chaos: $(INSTALLED) ## The long tests: kills, full disks, shifted clocks.
	$(BIN)/python -m pytest -m chaos $(PYTEST_ARGS) $(TESTS)

mutants: $(INSTALLED) ## Breaks the rules in 700 ways, one at a time; fails where no test of them does. Takes minutes.
	@rm -rf mutants
	$(BIN)/python -m mutmut run
	@set -e; survived=$$($(BIN)/python -m mutmut results); \
	if [ -n "$$survived" ]; then echo "$$survived"; echo "See one: $(BIN)/mutmut show NAME"; exit 1; fi

clean: ## Removes what was made, .venv and the demo's store included.
	rm -rf $(VENV) build dist mutants demo-store demo-bodies.jsonl .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find aiotracker tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
