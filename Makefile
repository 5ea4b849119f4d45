# Everything a user or a machine has to type. Each target sets up what it needs.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
NMS    := $(BIN)/nmsparse-deploy
MODEL  ?= demo
# Without an NVIDIA GPU the pinned set keeps pip from fetching gigabytes of CUDA; GPU users choose their own torch.
PINS   := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints/cpu.txt)
TORCH  := $(if $(PINS),torch==2.13.0,torch)

.PHONY: help setup demo test lint docs site bench matrix gpu-bundle gpu-proof gpu-learn clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/' | sort

setup: $(VENV)/.done  ## create .venv and install the package

# torchvision's wheel is a CUDA build; beside a CPU build of torch it needs the .pth before it can be imported.
$(VENV)/.done: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) $(TORCH)
	$(BIN)/python -m pip install --quiet $(PINS) -e '.[dev,vision]'
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'); \
	  cp tests/fixtures/torchvision_cpu.py "$$site/" && echo 'import torchvision_cpu' > "$$site/torchvision_cpu.pth"
	@touch $@

demo: setup  ## prune a real model to 2:4, prove it, export it, compare it, report; MODEL=vit for a vision model
	$(NMS) demo --model $(MODEL)

# Two processes with a thread each: two with two get in each other's way.
test: setup lint  ## the fast tests (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not matrix and not gpu'

lint: setup  ## ruff, mypy, the floors of the house, generated files are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: setup  ## write the generated parts of README.md and docs/
	$(BIN)/python docs/generate.py

site: $(VENV)/.docs docs  ## build the documentation into site/, strictly and without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.done
	$(BIN)/python -m pip install --quiet $(PINS) -e '.[docs]'
	@touch $@

bench: setup  ## speed of verify, of the sweep, of pruning the demo model, of --help; prints JSON
	$(BIN)/python benchmarks/run.py

matrix: setup  ## real small models and slow combinations (under 40 minutes)
	$(BIN)/python -m pytest -n 1 -m matrix

# A GPU machine may have no network: its own Python is used, and gpu-bundle/ brings what that lacks.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.done),$(BIN)/python,$(PYTHON))

gpu-bundle: setup  ## what a GPU machine without network lacks (wheels, models, texts), into gpu-bundle/
	$(BIN)/python -m benchmarks.gpu.bundle

gpu-proof:  ## needs a CUDA device: everything it can show, unattended, under 9 minutes; writes results/gpu
	$(GPU_PYTHON) -m benchmarks.gpu.proof

gpu-learn:  ## needs a CUDA device: a slice of the longer learning runs, 8 minutes; call it until it is done
	$(GPU_PYTHON) -m benchmarks.gpu.learn

clean:  ## remove what the targets made, but not the runs
	rm -rf $(VENV) build dist site *.egg-info
