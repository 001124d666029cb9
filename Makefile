# Every target sets itself up: `make demo` and `make test` work on a fresh clone with Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process a core, and a file of tests to one of them. `make test PARALLEL=` runs them one after another.
PARALLEL ?= --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: setup demo test test-lowest lint gpu-check clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

# The suite with the lowest version of everything that pyproject.toml asks for, in an environment of its own.
test-lowest: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv venv --quiet --seed --allow-existing --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	$(VENV)-lowest/bin/python -m pytest $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .typing && ln -sfn .. .typing/repa
	$(BIN)/mypy -p repa.cache_specs -p repa.kernels -p repa.pipeline -p repa.trainer

# On the machine with the GPU, with whatever torch it has: nothing is installed, the checkout is found by its name.
gpu-check:
	@mkdir -p .typing && ln -sfn .. .typing/repa
	PYTHONPATH=$(CURDIR)/.typing$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) $(VENV)-lowest .typing build *.egg-info .pytest_cache .mypy_cache .ruff_cache demo
