# Two commands on a fresh machine: `make demo` and `make test`. Each target makes .venv by itself.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-ray test-rest test-fallbacks lint soak bench

demo: .venv/installed
	$(BIN)/raybrats demo --out demo

# Two sessions side by side: much of what Ray's tests take is waiting for processes to start.
# The coverage is that of these two processes; what runs in Ray's workers is not in it.
test: .venv/installed lint
	$(MAKE) --keep-going --jobs=2 test-ray test-rest
	$(BIN)/coverage combine --quiet .coverage.ray .coverage.rest
	$(BIN)/coverage report

# With FALLBACKS=1 the others follow these, which end first.
test-ray: .venv/installed
	COVERAGE_FILE=.coverage.ray $(BIN)/pytest --cov --cov-report= --cov-fail-under=0 -m ray
	$(if $(FALLBACKS),$(MAKE) test-fallbacks)

test-rest: .venv/installed
	COVERAGE_FILE=.coverage.rest $(BIN)/pytest --cov --cov-report= --cov-fail-under=0 -m "not ray"

# What Ceph and PostgreSQL serve, once more on what stands in for them where they are not installed.
test-fallbacks: .venv/installed
	RAYBRATS_FALLBACKS=1 $(BIN)/pytest -m "(s3 or mlflow) and not (ray or slow)"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/ty check
	$(BIN)/deptry .

# What takes too long for every change: the jobs on real cases, where RAYBRATS_REAL_CASES has some,
# more kinds of faults, and chaos for five minutes.
soak: .venv/installed
	RAYBRATS_SOAK=1 $(BIN)/pytest -m slow

# The peers live in an environment of their own, which `make test` never sees. CASES=TREE: real ones.
bench: .venv-bench/installed
	for name in decode patches stream scaling; do \
		.venv-bench/bin/python tests/bench/$$name.py $(if $(CASES),--cases $(CASES)) || exit 1; \
	done
	for name in step checkpoint naive_ray_train; do \
		.venv-bench/bin/python tests/bench/$$name.py || exit 1; \
	done

# torch first and exactly: a looser wish would bring another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip check
	# The library that our networks are held to, without what else it wants, which no test needs.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		--target .venv/oracles dynamic_network_architectures
	touch $@

.venv-bench/installed: pyproject.toml constraints.txt tests/bench/constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$(grep '^torch==' constraints.txt)
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	.venv-bench/bin/pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c tests/bench/constraints.txt \
		$$(grep -E '^(nnunetv2|torchio|simpleitk)==' tests/bench/constraints.txt)
	.venv-bench/bin/pip check
	touch $@
