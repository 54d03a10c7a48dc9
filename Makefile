# `make test` and `make demo` each work on a fresh clone: both make the environment first.
#
#   PYTHON   the interpreter that makes the environment
#   VENV     the folder that it lies in
#   EVAL     the folder that `make eval-demo` writes to
#   BENCH    what else the benchmark is told, as in `make bench BENCH=--quick`
#   HOSTS    the versions of transformers that `make test-hosts` runs on

PYTHON ?= python3
VENV ?= .venv
EVAL ?= build/eval-demo
HOSTS ?= 5.12.0 5.16.1 5.19.0 5.20.2 5.23.0 5.24.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINI := examples/mini
HOST_TESTS := tests/test_cached_lm.py tests/test_doors.py tests/test_generate.py tests/test_laws.py \
	tests/test_hub.py tests/test_kinds.py tests/test_pipelines.py tests/test_streaming.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-slow test-hosts demo eval-demo bench hub format clean

help: ## print this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make the environment: the versions of constraints.txt, and the project in place

# The constraints hold from the first command on: an unpinned torch may be another build, gigabytes larger.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: name a Python 3.11 or newer, as in make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: $(PYTHON) is Python " + sys.version.split()[0] + ", and the versions of constraints.txt need 3.11 or newer: name one, as in make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing; this takes some minutes, and longer where torch brings the CUDA libraries along.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

test: $(STAMP) ## ruff, mypy and the tests, in some minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nudging_hf
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## the tests that `make test` leaves out: every architecture of transformers, in some minutes
	$(BIN)/python -m pytest -m slow

test-hosts: $(HOSTS:%=test-host-%) ## the tests that touch transformers, on each of HOSTS in an environment of its own

test-host-%: $(VENV)-hosts/%/.installed
	@echo "transformers $*"
	$(VENV)-hosts/$*/bin/python -m pytest $(HOST_TESTS)

# Of the constraints, those of torch and the tools: the rest is what each version of transformers asks for.
.PRECIOUS: $(VENV)-hosts/%/.installed
$(VENV)-hosts/%/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-hosts/$*
	grep -E '^(torch|numpy|pytest|pytest-xdist|hypothesis|accelerate|peft)==' constraints.txt > $(VENV)-hosts/$*/constraints.txt
	$(VENV)-hosts/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VENV)-hosts/$*/constraints.txt transformers==$* --editable '.[test-hosts]'
	@touch $@

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
	rm -rf $(VENV) $(VENV)-hosts build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
