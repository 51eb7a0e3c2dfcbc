PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: install quickstart test slow lint guides schema

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
