# Every target works alone on a fresh clone: what it needs, it makes.
# `make` without a target lists them.

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= mobilenet_v2
DEMO   ?= demo

bin     := $(VENV)/bin
stamp   := $(VENV)/.installed
sources := autotune search_spaces device_agents storage
linted  := $(sources) tests examples

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check format serve clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(stamp) ## Make .venv and install the versions of constraints.txt into it

# torch has builds for several kinds of hardware; naming the constraints in the one call that
# resolves everything is what keeps pip from taking another torch for a dependency's sake.
$(stamp): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: '$(PYTHON)' was not found; install Python 3.11 or newer (Debian and Ubuntu:" \
	       "apt install python3 python3-venv), or name one: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version) is too old, Python 3.11 or newer is needed;" \
	       "name one: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu:" \
	       "apt install python3-venv" >&2; exit 1; }
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the versions of constraints.txt into $(VENV); the first time takes some minutes" >&2
	$(bin)/python -m pip install --disable-pip-version-check --quiet \
	  -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(stamp) ## Train a small model and tune it for this machine (MODEL=mobilenet_v2 or resnet18)
	@case "$(MODEL)" in mobilenet_v2|resnet18) ;; *) \
	  echo "make: MODEL is '$(MODEL)'; the demo knows mobilenet_v2 and resnet18" >&2; exit 2;; esac
	$(bin)/python -m examples.digits.prepare --model $(MODEL) --out $(DEMO)
	$(bin)/autotune tune $(DEMO)/$(MODEL).yaml \
	  --out $(DEMO)/$(MODEL)-bundle --report $(DEMO)/$(MODEL)-report.html
	@echo "bundle: $(DEMO)/$(MODEL)-bundle (run it: $(bin)/python $(DEMO)/$(MODEL)-bundle/run.py)"
	@echo "report: $(DEMO)/$(MODEL)-report.html"

# pytest-cov prints the coverage of the four packages and fails the run under 85 %.
test: $(stamp) ## Run every test, with the coverage of the four packages
	$(bin)/python -m pytest $(addprefix --cov=,$(sources)) --cov-report=term --cov-fail-under=85

check: $(stamp) ## Formatting, lint, types, import contracts, layout and documentation tests
	$(bin)/ruff format --check $(linted)
	$(bin)/ruff check $(linted)
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/python -m pytest tests/architecture

format: $(stamp) ## Rewrite the files the way `make check` wants them
	$(bin)/ruff format $(linted)
	$(bin)/ruff check --fix $(linted)

serve: $(stamp) ## Run the service on this machine, on loopback
	$(bin)/autotune serve

clean: ## Remove .venv, the demo's files and every cache
	rm -rf $(VENV) $(DEMO) build dist *.egg-info htmlcov .coverage .coverage.* \
	  .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(linted) -name __pycache__ -type d -prune -exec rm -rf {} +
