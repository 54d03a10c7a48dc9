# `make test` and `make demo` each work on a fresh clone: both make the environment first.
#
#   PYTHON   the interpreter that makes the environment
#   VENV     the folder that it lies in
#   EVAL     the folder that `make eval-demo` writes to
#   BENCH    what else the benchmark is told, as in `make bench BENCH=--quick`

PYTHON ?= python3
VENV ?= .venv
EVAL ?= build/eval-demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINI := examples/mini

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test demo eval-demo bench hub format clean

help: ## print this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make the environment: the versions of constraints.txt, and the project in place

# The constraints hold from the first command on: an unpinned torch may be another build, gigabytes larger.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: name a Python 3.11 or newer, as in make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: $(PYTHON) is Python " + sys.version.split()[0] + ", and transformers 5.23 needs 3.11 or newer: name one, as in make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing; this takes some minutes, and longer where torch brings the CUDA libraries along.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

test: $(STAMP) ## ruff, mypy and the tests, in some minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nudging_hf
	$(BIN)/python -m pytest

demo: $(STAMP) ## see nudging at work, on a CPU
	$(BIN)/nudging-hf demo

# A run that was broken off goes on; where one was finished, a new one begins, for the code may be another.
# Models as small as these gain nothing by a second thread, which waits where the machine has other work.
eval-demo: $(STAMP) ## see what nudging is worth beside its rivals, on dev questions, in some minutes on a CPU
	@test ! -e $(EVAL)/results.json || rm -f $(EVAL)/results.json $(EVAL)/table.md $(EVAL)/answers.jsonl
	@mkdir -p $(EVAL)
	$(BIN)/python $(MINI)/world.py --dev $(EVAL)/dev.jsonl
	OMP_NUM_THREADS=1 $(BIN)/nudging-hf compare --prompts $(EVAL)/dev.jsonl --out $(EVAL) --limit 25 --batch-size 25 --max-new-tokens 220 \
		--base $(MINI)/models/base --nudging-model $(MINI)/models/nudging \
		--shared-nudging-model $(MINI)/models/nudging-shared --unaligned $(MINI)/models/nudging-shared-unaligned \
		--large-aligned $(MINI)/models/large-aligned

bench: $(STAMP) ## time nudging against everything else; BENCH=--quick to see that it runs
	$(BIN)/python benchmarks/run.py $(BENCH)

hub: $(STAMP) ## copy the code into hub_custom_code
	$(BIN)/nudging-hf hub code hub_custom_code

format: $(STAMP) ## sort the imports, mend what ruff can mend, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, what was built, and the caches
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "make: $(VENV) is no virtual environment, and stays" >&2; exit 1; }
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
