# Each target works from a fresh clone: the first one to run makes .venv and installs the pinned packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Training tokens of the demo's compile, and how many tasks its table is measured on.
DEMO ?= build/demo
DEMO_TOKENS ?= 1000000
DEMO_RUNS ?= 1500
DEMO_TASKS ?= 25

.PHONY: demo test check unit format clean

demo: $(VENV)/ready
	$(BIN)/engrain record examples/support_desk -o $(DEMO)/runs.jsonl -n $(DEMO_RUNS)
	$(BIN)/engrain compile examples/support_desk -o $(DEMO)/agent --data $(DEMO)/runs.jsonl --tokens $(DEMO_TOKENS)
	$(BIN)/engrain run $(DEMO)/agent --sample 3
	$(BIN)/engrain eval $(DEMO)/agent --arms base,lora --split held_out,faults -n $(DEMO_TASKS) --latency 3 \
		-o $(DEMO)/report

test: check unit

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/ready
	$(BIN)/pytest -q -n 2 --dist loadfile

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version, so that plain pip takes the CPU build where an index offers one.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or later is needed; try: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
