# Each target sets itself up: the first call builds .venv from requirements.txt.
PYTHON ?= python3
VENV ?= .venv
FLAGS ?=
PYTEST_FLAGS ?=

.PHONY: flow test lint docs

flow: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.ulpm_flow $(FLAGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n auto --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed requirements-docs.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

$(VENV)/.installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
