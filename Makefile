# Two commands on a fresh machine: `make demo` and `make test`. Each target makes .venv by itself.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint bench

demo: .venv/installed
	$(BIN)/raybrats demo --out demo

test: .venv/installed lint
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python tests/bench/decode.py

# torch first and exactly: a looser wish would bring another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip check
	touch $@
