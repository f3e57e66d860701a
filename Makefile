# Kvasir. Needs only make and a Python >= 3.11; everything else goes into .venv.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
	done)
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT  ?= 8000

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help install serve test test-long test-real check bench bench-vllm native docs clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv with base, engine and dev, pinned by constraints.txt

# torch goes first and alone, so that one local or CPU-only wheel is settled before the rest resolves.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or say: make PYTHON=/path/to/python3 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[engine,dev]' -c constraints.txt
	@touch $@

serve: $(STAMP) ## serve on PORT (8000): 1 prefill worker, 2 decode workers
	$(BIN)/kvasir serve --port $(PORT) --prefill 1 --decode 2

test: $(STAMP) ## the default suite (ten minutes on two cores)
	$(BIN)/python -m pytest tests -m "not long and not real"

test-long: $(STAMP) ## long tests, among them 1,000 fault seeds
	KVASIR_FAULT_SEEDS=$${KVASIR_FAULT_SEEDS:-1000} $(BIN)/python -m pytest tests -m long

test-real: $(STAMP) ## tests against real third-party parts (promtool, vLLM, ...), where installed
	$(BIN)/python -m pytest tests -m real

check: $(STAMP) ## ruff, mypy --strict on src, tidy (layers, purity, sizes)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_tidy.py

bench: $(STAMP) ## print the measured figures and their share of the limit
	$(BIN)/python bench/sim.py

native: $(STAMP) ## compile the CPU attention kernel for this processor (needs g++)
	$(BIN)/python -m kvasir.engine.native

bench-vllm: $(STAMP) ## the embedded engine beside vLLM on a CPU (installs it in .peers, 3 GB)
	sh bench/vllm.sh $(PYTHON)
	$(BIN)/python -m bench.vllm

docs: $(STAMP) ## run the examples in the docs
	$(BIN)/python -m pytest -q tests/unit/test_docs.py

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
