# Two commands set everything up, each in a virtual environment of its own making: `make merge` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STUDY := $(BIN)/python examples/order_study
export HF_HUB_OFFLINE ?= 1

.PHONY: merge study test lint types docs bench clean

# Trains a tiny base and three sub-models, merges them in three ways, and prints the held-out loss of all.
merge: $(VENV)/installed
	$(STUDY) train
	$(BIN)/mergekit-yaml recipes/average.yml models/average --quiet
	$(BIN)/mergekit-yaml recipes/select.yml out --quiet
	$(BIN)/mergekit-yaml recipes/resample.yml models/resample --quiet
	$(STUDY) compare base=./models/base order-1=./models/order-1 order-2=./models/order-2 order-3=./models/order-3 \
		average=./models/average selection=./out resampling=./models/resample

# A whole study of training orders, with results, tables and figures in runs/: docs/study.md tells what it measures.
CONFIG ?= examples/order_study/configs/quick.yaml
JOBS ?= 2
study: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plot]'
	$(STUDY) run $(CONFIG) --jobs $(JOBS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

# The documentation as a site, in site/; a broken link or anchor is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Both benchmarks, and the budgets beside their figures: docs/performance.md says how long it takes.
BENCH_OUT ?= runs/bench
BENCH_SCRATCH ?= runs/bench-scratch
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plot]'
	$(BIN)/python benchmarks/kernel.py --out $(BENCH_OUT)
	$(BIN)/python benchmarks/whole_process.py --scratch $(BENCH_SCRATCH) --out $(BENCH_OUT)
	$(BIN)/python benchmarks/budgets.py $(BENCH_OUT)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The site needs neither torch nor mergekit: the Python pages are read from the source, not imported.
$(VENV)/installed-docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0' 'ruff>=0.12'
	touch $@

clean:
	rm -rf $(VENV) models out
