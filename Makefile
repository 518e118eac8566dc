# `make demo` and `make test` need nothing but Python 3.11 or 3.12: they set up .venv themselves.
#   make demo     train the toy world on this machine (ARGS="--set train.steps=20" is passed on)
#   make test     lint, types and tests               (ARGS="tests/judge -k plural" is passed on)
#   make test-sglang  tests with the real SGLang on a CPU, in an environment of their own (3 GB)
#   make bench-gpu  every figure of the kernels on this machine's GPU (budget: nine minutes)
#   make lint     lint and types
#   make toybase  train the demo's base policy again
#   make venv     only the environment
#   make clean    remove what these commands made; data/ and runs/ stay

SHELL := /bin/bash
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
BIN := $(VENV)/bin
PACKAGES := core kernels rollout judge bench
TORCH ?= 2.13.0
# Asked only on Linux without an NVIDIA GPU, and only if pip's own sources have no CPU build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
QUICK := --no-deps --timeout 10 --retries 1

# Without it Python puts the script's folder first on its path, here core/ or bench/.
export PYTHONSAFEPATH := 1

.PHONY: help venv demo toybase test test-sglang bench-gpu lint links clean
help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

venv: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/torchrun --standalone --nproc-per-node 1 core/train.py $(ARGS)

# The packaged base policy again, from random weights; its conditions are checked at the end.
toybase: $(VENV)/.installed
	$(BIN)/speciarl data toymodel --out runs/toyinit
	$(BIN)/torchrun --standalone --nproc-per-node 1 core/sft.py --preset toybase
	$(BIN)/python bench/base.py --model runs/toybase/model

# With the python that is there: a GPU machine has its own build of torch; nothing need be installed.
# Peers are measured if they are: pip install 'speciarl[peers]'.
bench-gpu: links
	PYTHONPATH=build/ns $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) bench/gpu.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ARGS)

test-sglang: $(SGLANG_VENV)/.installed-sglang
	PYTHONPATH=$(CURDIR)/tests/sglang/shim OMP_NUM_THREADS=1 $(SGLANG_VENV)/bin/pytest tests/sglang $(ARGS)

lint: venv links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p speciarl

# The package's layout without an installation.
links:
	@mkdir -p build/ns/speciarl
	@for name in $(PACKAGES); do ln -sfn ../../../$$name build/ns/speciarl/$$name; done

$(VENV)/.torch-$(TORCH):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with its venv module is needed; if it has" \
		"another name: make venv PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null; then \
		echo "Installing torch $(TORCH)"; \
		$(PIP) torch==$(TORCH); \
	else \
		echo "No NVIDIA GPU: installing the CPU build of torch $(TORCH)"; \
		$(PIP) $(QUICK) torch==$(TORCH)+cpu 2>/dev/null \
		|| $(PIP) $(QUICK) --index-url $(TORCH_CPU_INDEX) torch==$(TORCH)+cpu 2>/dev/null \
		|| { echo "No CPU build found: installing the default one, which may be large"; \
			$(PIP) torch==$(TORCH); }; \
	fi
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/.torch-$(TORCH)
	@echo "Installing speciarl"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what development needs"
	@$(PIP) --editable '.[dev]'
	@touch $@

# SGLang's own dependencies ask for CUDA: an exact set is installed without them, see the file.
$(SGLANG_VENV)/.installed-sglang: tests/sglang/requirements.txt setup.py
	$(MAKE) VENV=$(SGLANG_VENV) TORCH=2.13.0 $(SGLANG_VENV)/.torch-2.13.0
	@echo "Installing SGLang for the CPU"
	@$(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--requirement tests/sglang/requirements.txt
	@$(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build speciarl.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
	find $(PACKAGES) tests -name __pycache__ -prune -exec rm -rf {} +
