# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SIDE := $(VENV)/share/flashar_pl/torch_fidelity
# uv takes a fraction of pip's time; it looks for wheels where pip is told to.
UV := UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --python $(BIN)/python
export OMP_NUM_THREADS ?= 1

# A file's tests run in one of two processes. A GPU is one: there, JOBS=0.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS)
NUMERICAL := backbones decoding layers metrics models planner sampling tokenizers

.PHONY: help setup constraints test test-slow test-rounding docs-check first-hour mutants load-test reliability-kills lint demo demo-full clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

setup: $(STAMP)  ## create .venv and install flashar-pl with its development tools

# torch-fidelity goes beside the environment, without its dependencies: a torchvision that does not match torch
# would break `import lightning`. flashar_pl/metrics/features.py loads the one file it needs from there.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(UV) --constraint constraints.txt --editable '.[dev]'
	$(UV) --no-deps --target $(SIDE) torch-fidelity==0.4.0
	$(BIN)/python -c 'import torch, torchmetrics, lightning'
	touch $(STAMP)

constraints: setup  ## write what is installed to constraints.txt, for a set-up that was tested anew
	(sed -n '/^#/p' constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | sed 's/+.*//') > .constraints
	mv .constraints constraints.txt

test: setup  ## the test suite: about 2 minutes on 2 cores, no network, weights or GPU
	$(PYTEST)

test-slow: setup  ## the tests marked slow
	$(PYTEST) -m 'slow and not gpu'

test-rounding: setup  ## the numerical tests as on other processors: fewest instructions, products that round another way
	ATEN_CPU_CAPABILITY=default $(PYTEST) -p tests.other_blas $(addprefix tests/,$(NUMERICAL))

docs-check: setup  ## run the commands of README and docs in scratch directories, parse those that need weights; ARGS=data.md
	$(BIN)/python -m tests.docs_check $(ARGS)

first-hour: setup  ## a wheel of this checkout in a fresh environment: 60 pictures, notebook; ARGS=--full for all steps and the demo
	$(BIN)/python -m tests.first_hour $(ARGS)

mutants: setup  ## plant 60 small faults in the core and ask its tests (about 15 minutes); ARGS="--seed 1" for others
	$(BIN)/python tests/mutants.py $(ARGS)

load-test: setup  ## a server asked by 8 clients for 3 minutes: errors, times, memory; SECONDS_OF_LOAD=20 for fewer
	$(BIN)/python -m tests.reliability.load $(or $(SECONDS_OF_LOAD),180)

.PHONY: reliability-files
reliability-files: setup  ## 100,000 damaged copies for each reader of files (half an hour); ROOM=data COUNT=1000 for fewer
	for room in $(or $(ROOM),$(patsubst tests/reliability/test_%.py,%,$(shell grep -l '^TARGETS' tests/reliability/test_*.py))); do \
		$(BIN)/python -m tests.reliability.mutate $$room $(or $(COUNT),100000) || exit 1; done

.PHONY: reliability-bits
reliability-bits: setup  ## 1,000 damaged copies of every file of a run: found or silent (2 minutes); COUNT=100 for fewer
	$(BIN)/python -m tests.reliability.bits $(or $(COUNT),1000)

.PHONY: reliability-disk
reliability-disk: setup  ## commands on disks of every size that is too small for them (20 minutes); ARGS="--most 20" for fewer
	$(BIN)/python -m tests.reliability.full_disk $(ARGS)

.PHONY: reliability-long
reliability-long: setup  ## 2,000 small training steps without growth of memory, open files or processes (2 minutes)
	$(BIN)/python -m tests.reliability.long_run $(ARGS)

reliability-kills: setup  ## kill and continue small runs at random moments, compare their ends (10 minutes); ARGS="--single 100"
	$(BIN)/python tests/reliability/kills.py $(ARGS)

lint: setup  ## ruff, import directions, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

demo: setup  ## embedded data set: shards, raster pre-training, FlashAR post-training, report (about 6 minutes)
	$(BIN)/flashar demo

demo-full: setup  ## the demo with the from-scratch contrast and a second sample seed
	$(BIN)/flashar demo --full

.PHONY: study-scenes
study-scenes: setup  ## Table 3 at our scale: raster, FlashAR, BlockDiffusion, training-free on the drawn scenes (45 CPU-minutes); given again it continues
	$(BIN)/python benchmarks/scenes.py

.PHONY: study-emoji
study-emoji: setup  ## drawings of an emoji font through a VQ trained here, raster and FlashAR, to pixels (needs the Debian packages fonts-noto-color-emoji, unicode-data); given again it continues
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/emoji.py

clean:  ## remove the environment and caches, never runs/ or data/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
