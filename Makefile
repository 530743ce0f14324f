# Needs Python 3.11 or later and nothing else; the environment is made in .venv on first use. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CODE := disaggregated kvtransfer context_server generation_server orchestrator tests benchmarks tools

TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-transfer bench-router bench-engine soak gpu stubs docs clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/run.stamp ## Chat with a real model served disaggregated, and see how each step was done
	@$(BIN)/disaggregated demo -c configs/quickstart.yml

test: check ## Everything CI runs: check, then unit, contract, sim and system tests
	@echo "== pytest"
	@$(BIN)/python -m pytest -m "not soak and not gpu" $(TWO_WORKERS) --durations=10

check: $(VENV)/dev.stamp ## Linters, types, import layers, generated code
	@echo "== ruff"
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/ruff format --quiet --check $(CODE) || { echo "run: $(BIN)/ruff format $(CODE)"; exit 1; }
	@echo "== mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "== import layers"
	@$(BIN)/lint-imports >$(VENV)/layers.log 2>&1 || { cat $(VENV)/layers.log; exit 1; }
	@echo "== generated code"
	@$(BIN)/python tools/generate_stubs.py --check

bench: $(VENV)/dev.stamp ## Measure on this machine; reports go to benchmarks/results
	@for name in ops start first_token overlap multi_turn routing; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-transfer: $(VENV)/dev.stamp ## KV transfer beside memcpy, sockets, NIXL and Mooncake, and its fault matrix: half an hour, on an idle machine
	@$(BIN)/python -m benchmarks.peers --only mooncake || echo "Mooncake is left out"
	@for name in transfer exposed streaming_cost conversion faults; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-router: $(VENV)/dev.stamp ## The front door beside sglang-router, vllm-router and nginx: fetches them first, then takes five minutes
	@$(BIN)/python -m benchmarks.peers --only routers
	@$(BIN)/python -m benchmarks.router

bench-engine: $(VENV)/dev.stamp ## The engine beside transformers, llama.cpp and vLLM: makes their environments first, then takes an hour
	@$(BIN)/python -m benchmarks.peers
	@$(BIN)/python -m benchmarks.quality
	@$(BIN)/python -m benchmarks.ops
	@$(BIN)/python -m benchmarks.step_overhead
	@$(BIN)/python -m benchmarks.engines --threads 1
	@$(BIN)/python -m benchmarks.engines --threads 2
	@$(BIN)/python -m benchmarks.systems

soak: $(VENV)/dev.stamp ## The long tests: minutes of load and faults
	@$(BIN)/python -m pytest -m soak --timeout 3600

gpu: ## Checks and figures of the CUDA path, with what is installed; says so where there is no GPU
	@if test -x $(BIN)/python; then $(BIN)/python -m benchmarks.gpu; else $(PYTHON) -m benchmarks.gpu; fi

stubs: $(VENV)/dev.stamp ## Generate disaggregated/v1 from proto/
	@$(BIN)/python tools/generate_stubs.py

docs: $(VENV)/run.stamp ## Print docs/config.md from the key tables, and the tables of docs/transfer-life-cycle.md
	@$(BIN)/python -m disaggregated.config.document > docs/config.md
	@$(BIN)/python -m kvtransfer.document

clean: ## Remove the environment and every cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: Python 3.11 or later is needed (make PYTHON=python3.11 ...)"; exit 1; }
	@test -x $(BIN)/python || { echo "== making the environment in $(VENV)"; $(PYTHON) -m venv $(VENV); } || \
		{ echo "making it failed: on Debian, apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "== installing what the servers need; torch is large, so this takes minutes"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "== installing what the tests need"
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps xgrammar apache-tvm-ffi  # It asks for triton, half a gigabyte, and needs none of it on a CPU.
	@touch $@
