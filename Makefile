# `make test` and `make demo` set up everything they need in .venv, from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup test lint demo clean

setup: $(VENV)/.ready

# The stamp is written last: an installation that was interrupted is taken up again.
$(VENV)/.ready: requirements*.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; make test PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest $(ARGS)

demo: setup
	@echo "make demo will teach a concept to a small model that ships with the project; that model is not here yet."
	@echo "With Stable Diffusion itself, the commands are in README.md."

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
