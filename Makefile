# Each target sets up all that it needs, once: a virtual environment in .venv and, for `test` as
# root on Debian, a real SLURM (by slurm/dev-cluster, when the tests ask for it).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE    # each command of the tests would compile distrain again

# pip would compile one file after another; files for other versions of Python are skipped.
define install
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch -e $(1)
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
endef

.PHONY: demo test test-all test-gpu test-clock test-compat check docs image faults flatness bench bench-quick

demo: $(VENV)/installed
	$(BIN)/python -m distrain +experiment=digits launch.ranks=2

# Three processes on two cores: a test waits for other processes a fifth of its time.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 3 -m "not slow"

# With what installs a browser or takes a minute: the first hour of docs/ line by line, TensorBoard as
# a person sees it.
test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2

# What needs a CUDA device; `make test` hides the GPUs from the tests, which put many ranks on the CPU.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 3 -m gpu

# What depends on the clock, on a machine that seems five times slower, then five times quicker.
CLOCK_TESTS := $(addprefix tests/,$(addsuffix .py,events/test_reduction trainer/test_loop \
    trainer/test_trainer hooks/test_replica_guard hooks/test_straggler hooks/test_throughput \
    job/test_end_of_run job/test_resume writers/test_background writers/test_console))
test-clock: $(VENV)/installed-dev
	for pace in 5 0.2; do \
	    TEST_CLOCK=$$pace $(BIN)/python -m pytest -n 2 -m "not slow" $(CLOCK_TESTS) || exit 1; done

# The oldest and the newest Python and torch that are supported, where they can be had.
test-compat:
	.ci/test-compat

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# docs/configuration.md from conf/ and the schema, then the pages of docs/ as a site in site/; a
# warning is an error. The variable quiets an advertisement.
docs: $(VENV)/installed-dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q


# A container image, built and tried without a container engine; as root on Debian.
image:
	.ci/build-image

# An hour or more: some 200 runs that are killed, stopped, signalled or damaged, and a table at
# the end of what became of them; then every file operation of a run's life with an error injected.
faults: $(VENV)/installed-dev
	$(BIN)/python tests/faults/campaign.py
	$(BIN)/python tests/faults/starts.py
	$(BIN)/python tests/faults/io_errors.py

# 400,000 steps of a tiny model: ten minutes or more.
flatness: $(VENV)/installed-dev
	$(BIN)/python tests/faults/flatness.py

# The peers live in a virtual environment of their own; what cannot be installed is left out.
BENCH := .bench-venv

bench: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks.overhead --max-s 7 --rounds 9
	$(BENCH)/bin/python -m benchmarks.peers --rounds 9
	$(BENCH)/bin/python -m benchmarks.options --rounds 7
	$(BENCH)/bin/python -m benchmarks.scaling --rounds 3
	$(BENCH)/bin/python -m benchmarks.optimizer --rounds 9
	$(BENCH)/bin/python -m benchmarks.checkpoint --saves 9
	$(BENCH)/bin/python -m benchmarks.startup --rounds 3
	$(BENCH)/bin/python -m benchmarks.memory --rounds 1
	$(BENCH)/bin/python -m benchmarks.stream
	$(BENCH)/bin/python -m benchmarks.loader
	$(BENCH)/bin/python -m benchmarks.gpu

bench-quick: $(VENV)/installed
	$(BIN)/python -m benchmarks.overhead --max-s 3 --rounds 0 --no-slowest
	$(BIN)/python -m benchmarks.optimizer --rounds 3
	$(BIN)/python -m benchmarks.checkpoint --saves 4 --period 20
	$(BIN)/python -m benchmarks.stream --rounds 3

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,'.[dev]')
	@touch $@ $(VENV)/installed

$(BENCH)/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	@echo '*' > $(BENCH)/.gitignore
	$(BENCH)/bin/python -m pip install -q -c constraints.txt torch -e .
	@grep -o '^[a-z<>0-9]*' benchmarks/requirements.txt | while read peer; do \
	    $(BENCH)/bin/python -m pip install -q -c constraints.txt "$$peer" || echo "without $$peer"; done
	@touch $@
