# Two environments: .venv runs everything; .img2dataset holds img2dataset alone, whose pins differ from ours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= sample

.PHONY: setup recipe test check down clean

setup: $(VENV)/.installed .img2dataset/.installed

# Said before anything is made: a wrong Python fails later and with a page of pip's output.
NEEDED := Python 3.11 or 3.12 is needed, $(PYTHON)
define check_python
@$(PYTHON) -c '' 2>/dev/null || { echo 'error: $(NEEDED) does not run; use make PYTHON=python3.11' >&2; exit 1; }
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "error: $(NEEDED) is %d.%d; use make PYTHON=python3.11" % v)'
endef

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	$(check_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c infra/constraints.txt -e '.[dev]'
	@touch $@

.img2dataset/.installed: infra/img2dataset.txt
	$(check_python)
	$(PYTHON) -m venv .img2dataset
	.img2dataset/bin/pip install --quiet -r infra/img2dataset.txt
	@touch $@

recipe: setup
	@$(BIN)/solo up
	@$(BIN)/python -m flows.server prefect deployment run solo/full-recipe --watch --param recipe=$(RECIPE)
	@$(BIN)/solo report $(RECIPE)

# A file to a process, three at once on two cores: many tests wait for servers and ranks.
test: setup
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

down:
	@$(BIN)/solo down

clean: down
	rm -rf .solo
