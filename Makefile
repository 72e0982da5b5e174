# Shortcuts for the commands in the README; each sets up .venv by itself.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet -c constraints.txt

.PHONY: image test test-long soak lint
.venv:
	$(PYTHON) -m venv .venv

image: .venv
	$(PIP) .
	.venv/bin/diffaccel sample "a red apple and a rocket on a blue background" --size 4096x4096

test: .venv
	$(PIP) -e '.[test]'
	.venv/bin/pytest

# ten times as many drawn cases: more than 5,000 against the oracle, 300 compositions
test-long: .venv
	$(PIP) -e '.[test,lora]'
	DIFFACCEL_TEST_CASES=10 .venv/bin/pytest tests/kernels tests/compositions

# ten minutes in which nothing may grow
soak: .venv
	$(PIP) -e '.[test]'
	.venv/bin/python -m tests.compositions.soak --minutes 10

lint: .venv
	$(PIP) -e '.[test]'
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.ci/as-installed mypy
	.ci/as-installed lint-imports --no-logo
