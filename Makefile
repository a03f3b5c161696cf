# `make demo` and `make test` need only git, make and Python >= 3.10: they set up .venv themselves, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := .venv-peers
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help setup demo test test-all test-integrations fuzz bench bench-peers audit lint format clean
help:
	@echo "make demo    train the MNIST autoencoder beside plain PyTorch; results in runs/demo"
	@echo "make test    run the tests, and fastae verify --quick (no GPU needed; five minutes on two cores)"
	@echo "make test-all  the same, with the mutants of fastae verify and short runs of every benchmark"
	@echo "make test-integrations  the tests that need other packages or a C++ compiler; installs the packages"
	@echo "make fuzz MINUTES=20  the tests of tests/fuzz with fresh examples until the minutes are over or one fails"
	@echo "make bench   measure fastae beside PyTorch on this machine (14 minutes); bench/results, and the README from it"
	@echo "make bench-peers  the same beside Keras, Lightning, scikit-learn, skorch and PyOD (5 minutes)"
	@echo "make audit   autoencoders of five libraries against closed forms; docs/wrong-by-default.md (7 minutes)"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the code the way 'make lint' wants it"
	@echo "make clean   remove the environment and caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastae needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m fastae.cli.demo --out runs/demo

test: $(READY)
	$(PYTEST)
	$(BIN)/fastae verify --quick --seed 0

test-all: $(READY)
	$(PYTEST) -m "not integrations"
	$(BIN)/fastae verify --quick --seed 0

test-integrations: $(READY)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[integrations,examples]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'aeon>=1.0' # for its data alone
	$(PYTEST) -m integrations

fuzz: $(READY)
	$(BIN)/python tests/fuzz $(MINUTES)

bench: $(READY)
	$(BIN)/fastae bench --report bench/results
	$(BIN)/python bench/readme.py

bench-peers: $(PEERS)/.ready
	cd bench && ../$(PEERS)/bin/python -m peers

audit: $(PEERS)/.ready
	cd bench && OMP_NUM_THREADS=1 ../$(PEERS)/bin/python -m peers.audit

$(PEERS)/.ready: pyproject.toml bench/peers/requirements.txt bench/peers/requirements-alone.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "bench/peers/requirements.txt pins wheels for Python 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 bench-peers" >&2; exit 1; }
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement bench/peers/requirements.txt --editable .
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement bench/peers/requirements-alone.txt
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PEERS) .mypy_cache .pytest_cache .ruff_cache
