# Two commands do everything on a machine with Python >= 3.11 (with venv), make and git: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# JAX 0.11 and newer need Python 3.12: the environment's Python, or the one that will make it, says which versions are tested with it.
CONSTRAINTS := $(shell $(firstword $(wildcard $(RUN)) $(PYTHON)) -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-newest.txt")')
PIP := $(RUN) -m pip --disable-pip-version-check --quiet install --constraint $(CONSTRAINTS)
DIST := dist
TESTS :=

.PHONY: demo test test-all keras-tests fuzz check bench dist docs clean

demo: $(VENV)/.parafit  ## train on the digits table; leaves out/digits with the model and report.html
	$(RUN) -m parafit train examples/data/digits.csv.gz --target digit --out out/digits

test: $(VENV)/.test  ## the test suite and the doctests, but for the slow tests; TESTS=tests/planner: those of a room
	$(RUN) -m pytest --numprocesses 2 -m 'not slow' $(TESTS)

test-all: $(VENV)/.test  ## every test: a quarter of an hour more
	$(RUN) -m pytest --numprocesses 2 $(TESTS)

keras-tests: $(VENV)/.test  ## Keras' own tests with parafit's fit, evaluate and predict in place: about ten minutes
	$(RUN) -m tests.keras_suite

SEED ?= 0
MINUTES ?= 10
fuzz: $(VENV)/.test  ## random networks on random plans against one device: make fuzz SEED=0 MINUTES=60
	$(RUN) -m tests.fuzz --seed $(SEED) --minutes $(MINUTES)

check: $(VENV)/.dev  ## format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.bench  ## a short benchmark against Keras, TensorFlow, PyTorch and scikit-learn
	$(RUN) -m benchmarks.run --quick --out out/bench.json

dist: $(VENV)/.dev  ## the wheel and the source distribution, in dist/
	$(RUN) -m build --outdir $(DIST)

docs: $(VENV)/.parafit  ## the API reference as text, out/api.txt
	mkdir -p out
	for module in parafit parafit.api parafit.planner.plan parafit.planner.machine.machine parafit.planner.cost.cost parafit.planner.cost.estimator parafit.planner.search.search parafit.planning parafit.planner.search.explain parafit.errors parafit.sklearn parafit.tables; do PYTHONPATH=src $(RUN) -m pydoc $$module; done > out/api.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "parafit needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.parafit: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.parafit

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable '.[test,dev]'
	@touch $@ $(VENV)/.test $(VENV)/.parafit

$(VENV)/.bench: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable '.[bench]'
	@touch $@ $(VENV)/.parafit

clean:
	rm -rf $(VENV) .venv-newest out build dist
