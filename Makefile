# `make demo`: install, run the pipeline on the embedded data set, show what came out.
# `make test`: install, check style and types, run the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# Where to fetch PyTorch from, if not from the usual index (for example its own index of CPU or CUDA builds).
TORCH_INDEX_URL ?=

# Stages are run as `python -m stages.x`: that must be the environment's Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: setup demo test check clean

setup: $(VENV)/.installed

# PyTorch first: without a GPU its CPU build is taken where one is on offer, and the rest then finds it installed.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
		echo "pip install torch==$(TORCH) from $(TORCH_INDEX_URL)"; \
		$(BIN)/pip install --quiet --index-url "$(TORCH_INDEX_URL)" torch==$(TORCH); \
	elif command -v nvidia-smi >/dev/null 2>&1; then \
		echo "pip install torch==$(TORCH)"; \
		$(BIN)/pip install --quiet torch==$(TORCH); \
	else \
		echo "no GPU found: pip install torch==$(TORCH)+cpu, or torch==$(TORCH) where that is not on offer"; \
		$(BIN)/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH); \
	fi
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

demo: setup
	dvc repro
	@python -m l2l_core show

check: setup
	ruff format --check .
	ruff check .
	mypy

# One thread a process: the tests run side by side, and oversubscribed threads are many times slower.
test: check
	OMP_NUM_THREADS=1 pytest -n auto --dist loadgroup

clean:
	rm -rf .scratch report metrics plots
