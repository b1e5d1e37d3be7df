# make demo   set up and run the main job     make test   set up and pass the tests
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check setup clean

demo: setup
	$(BIN)/draftwing demo

test: check
	$(BIN)/pytest tests -m "slow_on_cpu or not (slow or gpu)"

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

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
