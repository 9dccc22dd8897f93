# Two commands do everything, set-up included:
#   make demo    pack, train, evaluate and compare on a small corpus
#   make test    lint, types and a short version of every test
# and `make test-all` runs every test.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Threads of each process: two ranks or test workers share a laptop's cores.
export OMP_NUM_THREADS ?= 1
# Where it is set, every process compiles every module again: 6 s for each worker of the tests alone.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-all lint ruff format docs bench-peers slurm-up slurm-down clean

help:
	@sed -n 's/^# \{0,1\}//;1,5p' Makefile

install: $(VENV)/.installed

# Made again only when the requirements change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: '$(PYTHON) -m venv' failed; install the venv module of your Python (python3-venv)"; exit 2; }
	@echo "Installing into $(VENV) (2 GB, or 5.5 where torch comes with CUDA; minutes on a first call)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(VENV)/bin/cpsp-dist demo

PYTEST := $(RUN) -m pytest
# A worker keeps the files that it began, whose tests share what they are about.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# mypy, a minute of one core, runs beside the tests, which often wait; what it prints comes last. Both have to pass.
test: install ruff
	@types=$$(mktemp); $(VENV)/bin/mypy >"$$types" 2>&1 & mypy=$$!; \
	$(PYTEST) -m short $(WORKERS); tests=$$?; \
	wait $$mypy; status=$$?; cat "$$types"; rm "$$types"; \
	test $$tests = 0 && test $$status = 0

test-all: lint
	@$(PYTEST) -m "not timing" $(WORKERS)
	@$(PYTEST) -m timing

lint: ruff
	@$(VENV)/bin/mypy

ruff: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: install
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# The pages of docs/ as a site in site/.
docs: install
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt mkdocs
	@$(VENV)/bin/mkdocs build --strict --quiet

# The same samples through webdataset, mosaicml-streaming, litdata and the published layout, in environments of their own.
bench-peers: install
	@$(VENV)/bin/cpsp-dist bench peers

# A real Slurm of 2 virtual nodes on this machine, to try scripts on (Debian, root); the tests start one of their own.
slurm-up: install
	@$(RUN) tests/tools/slurm_lab.py install
	@$(RUN) tests/tools/slurm_lab.py up 2

slurm-down:
	@$(RUN) tests/tools/slurm_lab.py down

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
