# `make serve` and `make test` need Python >= 3.11, make and a C compiler, and nothing else: they
# create .venv and install the versions pinned in constraints.txt. Package indexes, mirrors and
# proxies are whatever pip is configured to use on this machine.

MODEL ?=
PORT ?= 8000
HOST ?= 127.0.0.1
DEVICE ?= auto
ARGS ?=

PYTHON ?= python3
VENV ?= .venv
CLIENTS_VENV ?= .venv-clients
AUDIT_VENV ?= .venv-audit
PYTEST_ARGS ?=
CLIENTS_ARGS ?=
WORKERS ?= 2
MINUTES ?= 30
TRACES ?= 300
SAVES ?= 1000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
CHECKED := server clients tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show the targets and their variables.
	@sed -n 's/^\([a-z-]*\): [^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo "  variables          MODEL PORT HOST DEVICE ARGS (serve), PYTEST_ARGS WORKERS (tests), MINUTES ARGS (soak), TRACES SAVES (test-traces), PYTHON VENV"

.PHONY: serve
serve: $(VENV)/.serve ## Serve MODEL (default: the shipped model) on HOST:PORT; ARGS are further flags.
	exec $(BIN)/gale serve $(if $(MODEL),--model '$(MODEL)') --host '$(HOST)' --port '$(PORT)' --device '$(DEVICE)' $(ARGS)

.PHONY: test
test: check ## Run make check, then every test that needs no GPU, browser or Prometheus.
	$(BIN)/python -m pytest -m "not gpu and not ops and not browser" -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: $(VENV)/.test ## Run the GPU tests; fails where there is no CUDA device.
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make test-gpu: torch finds no CUDA device")'
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

.PHONY: test-browser
test-browser: $(VENV)/.test ## Run the tests of the playground in Chromium; needs it and its driver.
	$(INSTALL) selenium
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

.PHONY: test-ops
test-ops: $(VENV)/.test ## Run the tests of running it for others; needs prometheus and promtool.
	$(BIN)/python -m pytest -m ops tests/ops $(PYTEST_ARGS)

.PHONY: test-traces
test-traces: $(VENV)/.test ## Run TRACES (default: 300) random traces of operations on states, and kill servers amid SAVES.
	$(BIN)/python -m pytest -m "not gpu" tests/traces --traces $(TRACES) --saves $(SAVES) $(PYTEST_ARGS)

.PHONY: soak
soak: $(VENV)/.test ## Put a server under mixed load for MINUTES (default: 30) and check what it must not lose.
	$(BIN)/python -m tests.ops.soak --minutes $(MINUTES) $(ARGS)

.PHONY: audit
audit: $(AUDIT_VENV)/.audit ## Look the pinned versions up in a database of known vulnerabilities; needs a network.
	@$(AUDIT_VENV)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt $(ARGS) \
		|| { echo "make audit: not passed: a pin has a vulnerability that is known, or the database could not be asked about every pin; the lines above tell which. Another database: ARGS='-s osv'; one of your own: ARGS='-s osv --osv-url URL'" >&2; exit 1; }

.PHONY: test-clients
test-clients: $(VENV)/.serve $(CLIENTS_VENV)/.clients ## Run clients that people use against a real server; CLIENTS_ARGS=--record keeps the outcome.
	SERVER_PYTHON='$(abspath $(BIN)/python)' $(CLIENTS_VENV)/bin/python -m pytest --tb=native tests/clients $(CLIENTS_ARGS)

.PHONY: check
check: $(VENV)/.test ## Lint, formatting and types, without changing a file.
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.test ## Format the code and apply the linter's safe fixes.
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

.PHONY: wheel
wheel: $(VENV)/.test ## Build the wheel into dist/.
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: install
install: $(VENV)/.serve ## Create the environment that make serve uses.

.PHONY: clean
clean: ## Remove the environment, caches and built files.
	rm -rf $(VENV) $(CLIENTS_VENV) $(AUDIT_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find server clients tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Gale needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.serve

$(CLIENTS_VENV)/.clients: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement tests/clients/requirements.txt
	@touch $@

$(AUDIT_VENV)/.audit:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit>=2.7'
	@touch $@
