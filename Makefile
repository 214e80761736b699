# `make` lists the targets. Only python3 with its venv module is assumed; every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
# Options of pip, such as an index: see requirements-cpu.txt
PIP_FLAGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
FAST := not slow and not dist and not fault and not slurm
# Without this DeepSpeed takes a machine with CUDA libraries but no GPU for a CUDA machine
ACCELERATOR = $$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 'DS_ACCELERATOR=cpu')")

.DEFAULT_GOAL := help
.PHONY: help env lint test test-fast test-fault test-fuzz test-slurm quickstart clean
test test-fast test-fault test-fuzz test-slurm: export OMP_NUM_THREADS := 1

help:
	@echo 'make env         a virtual environment in $(VENV) with everything, once'
	@echo 'make lint        ruff and mypy'
	@echo 'make test        every test but those of test-slurm'
	@echo 'make test-fast   the tests that need neither several processes nor many seconds'
	@echo 'make test-fault  every fault many times: VILLA_DS_FAULT_TRIALS=50 kills in one run, and so on'
	@echo 'make test-fuzz   VILLA_DS_FUZZ_TRIALS=10000 spoilt shard sets, recipes and journals'
	@echo 'make test-slurm  the batch scripts under a private SLURM on this machine; installs it with apt-get if it is missing'
	@echo 'make quickstart  the whole story on real data: shards, pre-training, adversary, evaluation'
	@echo 'make clean       remove caches and build products'

env: $(READY)

$(READY): requirements-cpu.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that start processes or take long run one after the other: their time limits mean something then.
test: test-fast
	env $(ACCELERATOR) $(BIN)/python -m pytest -m "not ($(FAST)) and not slurm"

test-fast: env
	env $(ACCELERATOR) $(BIN)/python -m pytest -n 2 -m "$(FAST)"

test-fault: export VILLA_DS_FAULT_TRIALS ?= 50
test-fault: env
	env $(ACCELERATOR) $(BIN)/python -m pytest tests/fault tests/dist/test_discard.py tests/dist/test_elastic.py

test-fuzz: export VILLA_DS_FUZZ_TRIALS ?= 10000
test-fuzz: env
	env $(ACCELERATOR) $(BIN)/python -m pytest -n 2 -rP tests/fuzz

test-slurm: env
	bash tests/slurm/install.sh
	env $(ACCELERATOR) $(BIN)/python -m pytest -m slurm

quickstart: env
	PATH="$(abspath $(BIN)):$$PATH" bash launch/quickstart.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
