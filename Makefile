# Each target sets itself up: the first call builds .venv from requirements.txt.
PYTHON ?= python3
VENV ?= .venv
FLAGS ?=
PYTEST_FLAGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: flow test hooks lint docs dist

flow: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.ulpm_flow $(FLAGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n auto --dist worksteal $(PYTEST_FLAGS)

# The hooks with PyTorch, Lightning and Hugging Face themselves; `make test` skips these tests.
hooks: $(VENV)/.hooks
	$(VENV)/bin/python -m pytest tests/test_arrays.py tests/test_hooks_*.py \
	    'tests/test_docs.py::test_the_code_of_a_page_runs[features]' \
	    'tests/test_docs.py::test_the_code_of_a_page_runs[language_models]' $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

# Wheel and source distribution in dist/; the wheel is tried in an environment of its own.
dist: $(VENV)/.dist
	rm -rf build dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && empty/bin/python -P ../tests/programs/light_install.py
	rm -rf build

$(VENV)/.dist: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check build twine
	touch $@

$(VENV)/.docs: $(VENV)/.installed requirements-docs.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

# PyTorch for the CPU first: its default wheel brings CUDA.
$(VENV)/.hooks: $(VENV)/.installed requirements-hooks.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --index-url $(TORCH_INDEX) $(shell grep '^torch==' requirements-hooks.txt)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-hooks.txt
	touch $@

$(VENV)/.installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed, and $(PYTHON) is not: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
