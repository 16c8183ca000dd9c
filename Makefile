# Every target does what it needs once and is quick the second time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: setup quickstart demo-rounds test soak up down lint format clean

setup: $(STAMP)

# Torch goes first and with its dependencies: on a machine with CUDA they are its libraries, and no
# lock made elsewhere can name them. Everything else is the lock, exactly.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.lock torch
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: setup
	$(BIN)/bootstrap quickstart

demo-rounds: setup
	$(BIN)/python benchmarks/demo_rounds.py --out docs/results

up: setup
	@$(BIN)/bootstrap up

down:
	@test ! -x $(BIN)/bootstrap || $(BIN)/bootstrap down

test: setup
	@sh scripts/chromium.sh
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# The fault suite of the intake at length, on loopback: 100,000 rows, 50 kills on a disk and 10 on S3. It adds to soak.md.
soak: setup
	BOOTSTRAP_SOAK_ROWS=100000 BOOTSTRAP_SOAK_KILLS=50 BOOTSTRAP_SOAK_STORE_KILLS=10 BOOTSTRAP_SOAK_OUT=soak.md \
		$(BIN)/python -m pytest -q --timeout 7200 tests/storage/test_faults.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
