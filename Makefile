# gradq: everything a newcomer needs. `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.gradq-installed
export GLOO_SOCKET_IFNAME ?= lo
# the tests share the cores among their processes: more threads of torch's would only wait for one another
test test-all: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@echo "==> installing gradq and its development tools into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "==> no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train a small GPT dense, bf16, int8 and int4 on 2 ranks; print what was saved
	@echo "==> training the same GPT four times on 2 ranks: dense, bf16, int8, int4 (under 6 minutes)"
	@$(BIN)/python examples/demo.py

lint: $(STAMP) ## ruff and mypy --strict
	@echo "==> ruff"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "==> mypy --strict gradq"
	@$(BIN)/mypy

test: $(STAMP) lint ## lint, types and the default tests (about 20 minutes)
	@echo "==> tests (2 to 4 real Gloo ranks on this machine)"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP) lint ## the default tests and the long ones
	@echo "==> all tests, the long ones too"
	@$(BIN)/python -m pytest -m 'not gpu'

bench: $(STAMP) ## the kernel speeds behind the README
	@$(BIN)/python benchmarks/kernels.py

format: $(STAMP) ## let ruff format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
