# make quickstart   the whole road on a small model: data, training, text, scores, export
# make test         lint and all tests
# make test-full    the same with the larger matrix of layouts
# make lint         style, types, layers, file sizes
# make reference    write configs/neox_arguments.md and configs/schema.json from the schema
# make clean        remove the environment and caches (not data, checkpoints or logs)
#
# PYTHON=/path/to/python chooses the interpreter (3.11, 3.12 or 3.13). Settings of pip (PIP_INDEX_URL, ...) are honoured.

.PHONY: quickstart test test-full lint reference clean
.DEFAULT_GOAL := quickstart

VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
RUN_FILES := requirements requirements-eval requirements-data requirements-plot
JOBS ?= 2

# Optional C++ extensions of DeepSpeed are never built; one thread per process, because there are several.
export DS_BUILD_OPS := 0
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install

quickstart: $(RUN_STAMP)
	@$(BIN)/python tools/quickstart.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests

# Everything that `test` runs and the larger matrix of layouts (docs/parallel_equivalence.md), with the slowest tests named.
test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "full or not full" --durations=40 tests

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python -m tests.meta.check_file_sizes

reference: $(RUN_STAMP)
	$(BIN)/python -m megatron.engine.deepspeed_keys
	$(BIN)/python -m megatron.config.reference

clean:
	rm -rf $(VENV) .ruff_cache .mypy_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on the PATH may be a shim whose interpreter is not installed, or a Python without venv: try each.
$(BIN)/python:
	@for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3}; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$("$$candidate" --version) ($$candidate)"; \
	    "$$candidate" -m venv --clear $(VENV) && exit 0; \
	    rm -rf $(VENV); exit 1; \
	  fi; \
	done; \
	echo "error: no usable Python 3.11, 3.12 or 3.13 (with venv) was found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 2

$(RUN_STAMP): $(RUN_FILES:%=requirements/%.txt) requirements/constraints.txt | $(BIN)/python
	@rm -f $@
	@echo "installing PyTorch, DeepSpeed, transformers, lm-eval and matplotlib into $(VENV): 2 to 10 minutes, 2 GB (CUDA: 7 GB), once"
	@$(PIP) $(RUN_FILES:%=-r requirements/%.txt)
	@touch $@

$(DEV_STAMP): requirements/requirements-dev.txt $(wildcard requirements/requirements-*.txt) $(RUN_STAMP)
	@rm -f $@
	@echo "installing the tools for tests and every optional feature into $(VENV): 1 to 3 minutes, once"
	@$(PIP) -r requirements/requirements-dev.txt
	@touch $@
