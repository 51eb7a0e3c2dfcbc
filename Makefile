PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: install quickstart test test-oldest slow lint guides schema docs docs-pages docs-check

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python scripts/quickstart.py

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the oldest versions that pyproject.toml allows, in an environment of their own
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[test]'
	touch $@

slow: install
	$(BIN)/python -m pytest -m slow -s

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/guides.py trainers scripts tests

# how long files and functions may be, and how dense their lines are
guides: install
	$(BIN)/python scripts/guides.py --statistics

schema: install
	$(BIN)/python -m trainers.config.loading > configs/schema.json

# the generated pages of docs/: every key of the configs, every script, other trainers' keys
docs-pages: install
	$(BIN)/python scripts/documentation

# every command, override, snippet and link of README, docs and configs
docs-check: install
	$(BIN)/python scripts/documentation --check

# the site, into site/; it needs no network once the extra `docs` is installed
docs: docs-pages
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
