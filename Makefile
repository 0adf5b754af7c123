# What people and CI run. Everything is built below this folder: .venv for development and training,
# .venv-edge as a device has it (neither torch nor flwr).

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo check test clean

# The first Python that fits; another one: make install PYTHON=/path/to/python
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
BIN := .venv/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -qq

help: ## Show this list
	@echo "make install  create .venv and .venv-edge, or do nothing when both are current"
	@echo "make demo     install, then train, release and run a model in under a minute"
	@echo "make check    quick loop: format, lint, types, imports, fast tests"
	@echo "make test     everything that CI runs"
	@echo "make clean    remove what the above have written, .venv and .venv-edge too"

install: .venv/installed .venv-edge/installed

.venv/installed: pyproject.toml
	@$(call new_venv,.venv)
	@echo "Installing fedge[dev] into .venv (a few minutes the first time)"
	@.venv/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

.venv-edge/installed: pyproject.toml
	@$(call new_venv,.venv-edge)
	@echo "Installing fedge[edge] into .venv-edge"
	@.venv-edge/bin/python $(PIP_INSTALL) -e '.[edge]'
	@touch $@

define new_venv
	if ! [ -x $(1)/bin/pip ]; then \
		if ! $(PYTHON) -c '$(FITS)' 2>/dev/null; then \
			echo "fedge needs Python 3.11 or 3.12: install one, or name it with make install PYTHON=..." >&2; \
			exit 1; \
		fi; \
		$(PYTHON) -m venv $(1); \
	fi
endef

demo: install
	@$(BIN)/fedge demo

check: install
	@$(BIN)/ruff format $(if $(CI),--check )--quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@PYTHONPATH=.src $(BIN)/lint-imports --no-cache
	@$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.src $(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv .venv-edge .bench build dist *.egg-info \
		.mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
