# Two commands are enough: `make demo` shows the whole job, `make test` proves it. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: help demo test test-all check format bench golden docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/.user: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.user  ## prepare, train, measure and draw handwritten digits, with a report
	$(BIN)/imagekiln demo --out runs/demo

test: $(VENV)/.dev  ## the tests everybody runs
	$(RUN) -m pytest -n 2 --dist loadfile

test-all: $(VENV)/.dev  ## also the ones that take minutes
	$(RUN) -m pytest -n 2 --dist loadfile -m "not gpu" --timeout=3600

check: $(VENV)/.dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## speed against peers, in pairs
	$(RUN) benchmarks/train_speed.py
	$(RUN) benchmarks/trainer_overhead.py

golden: $(VENV)/.dev  ## rewrite the golden numbers; read the diff
	IMAGEKILN_REWRITE_GOLDEN=1 $(RUN) -m pytest tests/golden tests/docs

docs: $(VENV)/.dev  ## rewrite the generated parts of README and docs
	$(RUN) docs/generate.py

clean:  ## remove the environment and the demo's run
	rm -rf $(VENV) runs/demo
