# `make demo` and `make test` need nothing but Python 3.11+. PIP_* variables and pip's own configuration are respected.

PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := demo,dev,retrieval,app
SOURCES := rsgrpo recipes rewards rollout benchmarks tests tools setup.py

export TOKENIZERS_PARALLELISM ?= false
# Threads that wait must not spin on the cores where another process works.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo desk-demo evisrag-mini test test-all test-gpu gpu-day chaos check lint wheel-check format install clean
.DELETE_ON_ERROR:

# Each step names the file that its program writes last, so that an interrupted step is resumed.
# make demo FAMILY=qwen3_5 trains a small model of another family on the same rows, in the folder demo-qwen3_5.
FAMILY ?= qwen2_5_vl
DEMO := demo$(addprefix -,$(filter-out qwen2_5_vl,$(FAMILY)))
DATA_AND_MODEL := $(DEMO)/model/preprocessor_config.json
WARM_START := $(DEMO)/sft/export/preprocessor_config.json
# Settings of the recipes where the folder is not the one that they name.
ELSEWHERE = $(if $(filter-out demo,$(DEMO)),$(1) data.train=$(DEMO)/data/$(2).jsonl data.val=$(DEMO)/data/val.jsonl)

demo: $(WARM_START)
	$(BIN)/python -m rsgrpo.train recipe=demo $(call ELSEWHERE,name=$(DEMO) model.path=$(DEMO)/sft/export,train)

# A policy that looks for its pages: thumbnails, then open and zoom (docs/howto/desk.md).
DESK_MODEL := desk/model/preprocessor_config.json
DESK_WARM_START := desk/sft/export/preprocessor_config.json

desk-demo: $(DESK_WARM_START)
	$(BIN)/python -m rsgrpo.train recipe=desk_demo

$(DESK_MODEL): | $(INSTALLED)
	$(BIN)/python -m recipes.prepare desk

$(DESK_WARM_START): | $(DESK_MODEL)
	$(BIN)/python -m recipes.sft recipe=sft_desk_demo

# EVisRAG's stages in small, from data in its layout to a server; the demo's warm start is used if it exists.
# make evisrag-mini ENGINE=hf evaluates and answers with the embedded engine, without vLLM.
ENGINE ?= vllm
evisrag-mini: | $(DATA_AND_MODEL)
	$(BIN)/python -m recipes.evisrag_mini --engine $(ENGINE)

$(DATA_AND_MODEL): | $(INSTALLED)
	$(BIN)/python -m recipes.prepare demo --out $(DEMO) --family $(FAMILY)

$(WARM_START): | $(DATA_AND_MODEL)
	$(BIN)/python -m recipes.sft recipe=sft_demo $(call ELSEWHERE,output_dir=$(DEMO) model.path=$(DEMO)/model,sft)

# Budget: at most 12 minutes on 2 idle cores. The slowest tests are listed at the end; mark slow ones for test-all.
# The files of tests are shared out to this many processes, which need up to 5 GB of memory each.
TEST_PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15
test: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(INSTALLED)
	$(PYTEST) -m "not gpu"

# Without a .venv from `make` it uses python3: torch, transformers, peft and pytest are enough; tests that need more
# (vLLM, Ray, hydra) are then skipped.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu

# Everything that is worth measuring on GPUs, by value; run it again to resume. ARGS="--list" shows the steps,
# ARGS=--rehearse takes all of them with tiny shapes on the CPU. docs/gpu/README.md says more.
gpu-day:
	$(GPU_PYTHON) -m benchmarks.gpu_day $(ARGS)

# Every process of a run, stopped and killed in every phase: about two hours on 2 cores; run it again to resume.
chaos: $(INSTALLED)
	$(BIN)/python -m tests.runs.chaos --table $(ARGS)

# What continuous integration checks; `make lint` is the part without tests.
check: lint
	$(MAKE) test

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

# The built wheel in an empty environment and an empty folder, as for a user without a clone.
wheel-check: $(INSTALLED)
	$(BIN)/python tools/try_wheel.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/python tools/config_reference.py
	$(BIN)/python tools/api_reference.py

install: $(INSTALLED)

# torch first and alone: where pip finds a CPU build, the rest then resolves against it and brings no CUDA libraries.
$(INSTALLED): setup.py tools/constraints.txt tools/torchvision_cpu_shim.py tools/install_vllm.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c tools/constraints.txt torch
	$(BIN)/python -m pip install -c tools/constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python tools/torchvision_cpu_shim.py
	$(BIN)/python tools/install_vllm.py
	@touch $@

clean:
	rm -rf demo demo-* desk evisrag-mini runs outputs multirun wandb build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
