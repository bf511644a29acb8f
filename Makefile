# `make repro` and `make test` are all a fresh clone needs: each sets itself up first.
SHELL := bash
.DEFAULT_GOAL := help

BIN := .venv/bin
INSTALLED := .venv/installed
# Python to build .venv with; without it, the first of these that is new enough: make repro PYTHON=/opt/python3.12/bin/python3
PYTHON ?=
CANDIDATES := python3.11 python3 python3.12 python3.13
# Where `make ui` listens, and the two servers of `make server`.
PORT ?= 5000
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200
# Whose flow runs `make worker` takes: make worker POOL=lexiseg-gpu
POOL ?= lexiseg-cpu
# More arguments for pytest: make test ARGS="tests/data -x"
ARGS ?=

# dvc starts the stages by their command name, `lexiseg`.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing phones home; lexiseg sets the same for itself (src/lexiseg/environment.py), this is for dvc and mlflow alone.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export ITERATIVE_DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The world's recipe comes out of the repository itself.
WORLD = if [ -e data/world ]; then echo "data/world is there"; else dvc pull --remote embedded data/world; fi

comma := ,
say = @printf '\n==> %s\n' "$(1)"

.PHONY: help install a-clone repro test test-all lint format ui server worker clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

repro: a-clone $(INSTALLED) ## run the whole graph: data, encoders, training, evaluation, MLflow; then print the results
	$(call say,1/4 the embedded data set)
	@$(WORLD)
	$(call say,2/4 the settings$(comma) and the graph (a stage whose data$(comma) code and parameters are unchanged is skipped))
	@lexiseg profile show
	@lexiseg mend
	@dvc repro
	$(call say,3/4 publishing to MLflow what it lacks)
	@lexiseg sync
	$(call say,4/4 results (make ui shows the runs))
	@lexiseg report

test: a-clone $(INSTALLED) ## the tests, without the long journeys
	@$(WORLD)
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-all: a-clone $(INSTALLED) ## all tests, the long journeys too
	@$(WORLD)
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(INSTALLED) ## style, types and the direction of imports
	ruff check .
	ruff format --check .
	pyright
	lint-imports

format: $(INSTALLED) ## put the code into the agreed format
	ruff check --fix .
	ruff format .

ui: $(INSTALLED) ## MLflow's pages on this machine: make ui PORT=5000
	$(call say,http://127.0.0.1:$(PORT)  (Ctrl+C ends it))
	@home="$$(python -c 'from lexiseg.workspace import private_folder, require_root as root; print(private_folder(root()))')"; \
	mkdir -p "$$home"; \
	mlflow server --backend-store-uri "sqlite:///$$home/mlflow.db" --host 127.0.0.1 --port $(PORT) --workers 1

server: $(INSTALLED) ## Prefect and MLflow on this machine: make server PREFECT_PORT=4200 MLFLOW_PORT=5000
	@exec python flows/server.py --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

worker: export PREFECT_API_URL ?= http://127.0.0.1:$(PREFECT_PORT)/api
worker: $(INSTALLED) ## run the flow runs of a Prefect server one by one: make worker POOL=lexiseg-cpu
	@exec prefect worker start --pool $(POOL)

clean: ## remove unfinished and finished work and caches; data, outputs, runs and .venv stay
	@if [ -x $(BIN)/lexiseg ]; then lexiseg clean; fi
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache .grimp_cache
	@find src flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

a-clone:
	@git rev-parse --is-inside-work-tree > /dev/null 2>&1 || { printf '%s\n' \
		"found: $(CURDIR) is not a git working tree" \
		"allowed: a clone of the repository; DVC finds its place by git" \
		"to do: git clone the repository and run make repro in the clone" >&2; exit 1; }

install: $(INSTALLED) ## create .venv and install, where pyproject.toml or constraints.txt changed

$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
		version=$$($$candidate -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null) || continue; \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; \
		then chosen=$$candidate; break; else seen="$$seen $$candidate is $$version;"; fi; \
	done; \
	if [ -z "$$chosen" ]; then printf '%s\n' \
		"found:$${seen:- no python among $(or $(PYTHON),$(CANDIDATES))}" \
		"allowed: Python 3.11 or newer, with its modules venv and ensurepip" \
		"to do: install one (Debian: apt install python3.11-venv), or name one: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3" >&2; exit 1; fi; \
	printf '\n==> installing into .venv (%s, %s); the first time this fetches some GB and takes minutes\n' "$$chosen" "$$version"; \
	$$chosen -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)
