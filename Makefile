# make demo   set up and run the main job     make test   set up and pass the tests
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check setup assets clean

demo: setup
	$(BIN)/draftwing demo

test: check
	$(BIN)/pytest tests/lossless tests/compat tests/e2e -m "not slow and not gpu"

# The one definition of "clean": format, lint, types, import directions, fast tests.
check: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit tests/architecture

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
	for part in target eagle1 eagle3 medusa draft; do \
	    mkdir -p src/draftwing/assets/tiny/$$part && \
	    cp build/tiny/$$part/*.json build/tiny/$$part/*.safetensors src/draftwing/assets/tiny/$$part/; \
	done
	cp build/tiny/target/chat_template.jinja src/draftwing/assets/tiny/target/
	cp build/tiny/target/prompts.jsonl src/draftwing/assets/tiny/

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
