# What people and CI run. Everything is built below this folder: .venv for development and training,
# .venv-edge as a device has it (neither torch nor flwr).

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
# Where it is set, each of the hundreds of processes of the tests would compile fedge anew.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo static check test soak upgrade clean

# The first Python that fits; another one: make install PYTHON=/path/to/python
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
BIN := .venv/bin
# A file is one worker's, as its tests share what they start.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Before the tests; tests/test_ci.py leaves it out.
STATIC ?= static

help: ## Show this list
	@echo "make install  create .venv and .venv-edge, or do nothing when both are current"
	@echo "make demo     install, then train, release and run a model in under a minute"
	@echo "make check    before a commit: format, lint, types, imports, unit tests; under 90 s"
	@echo "make test     what CI runs: with real federations, a kill, an attack; under 10 minutes"
	@echo "make soak     everything: all kills, networks, hosts, audits, documents; about an hour"
	@echo "make upgrade  write constraints/ anew with the newest versions, then test them"
	@echo "make clean    remove what the above have written, .venv and .venv-edge too"

install: .venv/installed .venv-edge/installed

.venv/installed .venv-edge/installed: pyproject.toml $(wildcard constraints/*.txt)

.venv/installed:
	@$(call new_venv,.venv)
	@$(call pip_install,.venv,dev)
	@touch $@

.venv-edge/installed:
	@$(call new_venv,.venv-edge)
	@$(call pip_install,.venv-edge,edge)
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

# The versions that the tests have passed with; also of what builds, which pip would fetch anew without them.
define pip_install
	constraints=constraints/python$$($(1)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	pip="$(1)/bin/python -m pip install --disable-pip-version-check -c $$constraints"; \
	echo "Installing fedge[$(2)] into $(1), with the versions of $$constraints (some minutes the first time)"; \
	$$pip -q setuptools; \
	$$pip --no-build-isolation -e '.[$(2)]' | sed -un -e 's/^\(Installing collected\).*/\1 packages, a minute/' -e '/^Collecting\|^  Downloading\|^Installing/p'
endef

demo: install
	@$(BIN)/fedge demo

static: install
	@$(BIN)/ruff format $(if $(CI),--check )--quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@PYTHONPATH=.src $(BIN)/lint-imports --no-cache

check: install $(STATIC)
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not realtime and not soak"

# The realtime tests last: .ci/run plays theirs again, and nothing after them.
test: install $(STATIC)
	@$(BIN)/python benchmarks/soak.py --age
	@rm -f .pytest_cache/realtime-failed
	$(BIN)/pytest -q $(PARALLEL) -m "not realtime and not soak"
	$(BIN)/pytest -q -m "realtime and not soak" $$(grep -rl --include='test_*.py' mark.realtime tests)

soak: install $(STATIC)
	$(BIN)/python benchmarks/soak.py

upgrade: install
	@for version in 3.11 3.12; do \
		$(BIN)/uv pip compile pyproject.toml --extra dev --upgrade --python-version $$version \
			--python-platform linux --prerelease disallow --no-header --no-annotate --quiet \
			--output-file constraints/python$$version.txt; \
	done
	@git --no-pager diff --stat -- constraints
	@git --no-pager diff --unified=0 -- constraints | grep '^[+-][a-z]' || echo "nothing newer"
	$(MAKE) test

clean:
	rm -rf .venv .venv-edge .bench build dist *.egg-info \
		.mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
