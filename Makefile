# make quickstart   install, then train base -> SFT -> DPO on two cores in about half a minute
# make test         install, then run the whole test suite
# make lint         install, then ruff and mypy
# make stress       install, then kill a run at 30 random moments and compare the bits (about 9 minutes)
# make bench        install, then the toolkit against plain TRL on this machine's CPU (about half an hour)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The models here are tiny: more threads gain little on an idle machine, and lose much on a busy one.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint stress bench clean

quickstart: $(INSTALLED)
	$(BIN)/toolkit train recipes/quickstart/sft_dpo_lora.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

stress: $(INSTALLED)
	$(BIN)/python tests/stress.py

bench: export OMP_NUM_THREADS = $(shell nproc)
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
