PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable
WITH ?= test
# Each file's tests stay in one of two processes, and begin in the order that conftest.py gives.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1
PRESET ?= tiny
# Two small notebooks at a time take less time than one on two threads; a large model has the machine to itself.
WORKERS ?= $(if $(filter tiny,$(PRESET)),2,1)

TESTS := test test-slow test-rehearsal test-browser
$(TESTS): export OMP_NUM_THREADS := 1
# Nothing of ours is compiled: without TorchDynamo bitsandbytes is imported in two thirds of the time.
run $(TESTS): export TORCHDYNAMO_DISABLE := 1

.PHONY: install extras run test test-slow test-rehearsal test-rehearsal-long test-browser lab data notebooks longrope race bench gpu tiny-llama lock help

help:
	@echo "make install     the packages into .venv, the corpora into data/cache; the others do it first"
	@echo "make run         install, then execute the notebooks into runs/ (PRESET=tiny)"
	@echo "make test        install, then all tests, notebooks included"
	@echo "make extras      what test-slow, test-browser and race need besides; they install it themselves"
	@echo "make test-slow   runs that are killed at 23 moments, disturbed and attacked (two minutes)"
	@echo "make test-rehearsal  preset llama2-7b from a hub on this machine to notebook 8, with a doll of the model, and the stages after it (270 CPU seconds)"
	@echo "make test-rehearsal-long  the same with llama3.1-8b, on sequences of 131,072 tokens (40 minutes on two cores)"
	@echo "make test-browser  JupyterLab in headless Chromium: Run All, bars, the control, the panel, links, an interruption (three minutes)"
	@echo "make lab         install, then open the notebooks in JupyterLab"
	@echo "make data        fetch the corpora into data/cache (part of the installation)"
	@echo "make notebooks   execute the notebooks and store their outputs, figures and records"
	@echo "make longrope    search LongRoPE's factors for the preset's [race] and store their record (10 minutes)"
	@echo "make race        measure every arm of notebook 11 and store its record (one to two hours; goes on if stopped)"
	@echo "make bench       measure training steps and those of other trainers, for notebook 4 (hours; goes on if stopped)"
	@echo "make gpu         measure training steps on a GPU against the ledger, for notebook 4 (9 minutes; goes on if stopped)"
	@echo "make tiny-llama  train data/tiny-llama again (one to two hours; needs a C++ compiler)"
	@echo "make lock        write environment.yml and requirements.lock from pyproject.toml"

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "installing the packages into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(PIP) ".[$(WITH)]"
	@touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m llama_long_utils.data.sources
	@touch $@

install: $(READY)

# What few targets need. Their tests are skipped where it cannot be had.
.venv/.browser .venv/.workflow: .venv/.%: $(READY)
	-$(PIP) ".[test,$*]" && touch $@

extras: $(READY)
	-$(PIP) ".[test,browser,workflow]" && touch .venv/.browser .venv/.workflow

run: $(READY)
	$(BIN)/python -m tools.run --preset $(PRESET) --workers $(WORKERS)

test: $(READY)
	$(PYTEST) --nbval tests notebooks

test-slow: .venv/.workflow
	$(PYTEST) tests/slow

test-rehearsal: $(READY)
	$(PYTEST) tests/rehearsal -m "not long"

test-rehearsal-long: $(READY)
	$(BIN)/python -m pytest tests/rehearsal -m long -o faulthandler_timeout=0

test-browser: .venv/.browser
	$(BIN)/python -m pytest tests/browser

lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

data: $(INSTALLED)
	$(BIN)/python -m llama_long_utils.data.sources
	@touch $(READY)

notebooks: $(READY)
	$(BIN)/python -m tools.run --store

longrope: $(READY)
	$(BIN)/python -m experiments longrope --preset $(PRESET)

race: .venv/.workflow
	$(BIN)/snakemake -s experiments/Snakefile --profile experiments/profiles/default --cores 2 race --config preset=$(PRESET)

bench: $(READY)
	$(BIN)/python -W ignore -m experiments bench

gpu: $(READY)
	-$(BIN)/python -m pytest -q -m gpu tests
	PYTORCH_ALLOC_CONF=expandable_segments:True $(BIN)/python -W ignore -m experiments gpu

tiny-llama: $(READY)
	$(BIN)/python -m experiments tiny-llama

lock: $(READY)
	$(BIN)/python -m tools.lock
