# Two commands set everything up, each in a virtual environment of its own making: `make merge` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: merge study test test-slow coverage lint types kernel sanitize fuzz faults mutants docs bench clean

# Trains a tiny base and three sub-models, merges them in three ways, and prints the held-out loss of all.
merge: $(VENV)/installed
	$(BIN)/python -m examples.quickstart.train
	$(BIN)/mergekit-yaml recipes/average.yml models/average --quiet
	$(BIN)/mergekit-yaml recipes/select.yml out --quiet
	$(BIN)/mergekit-yaml recipes/resample.yml models/resample --quiet
	$(BIN)/python -m examples.quickstart.compare models/base models/order-1 models/order-2 models/order-3 \
		models/average selection=out resampling=models/resample

# A whole study of training orders, with results, tables and figures in runs/: docs/study.md tells what it measures.
CONFIG ?= examples/order_study/configs/quick.yaml
JOBS ?= 2
study: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[study]'
	$(BIN)/python -m examples.order_study $(CONFIG) --jobs $(JOBS)

# Two processes: most tests start commands that load torch and mergekit for seconds.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tests of a minute and more: kills at twenty points, the walk of docs/sharing.md, the notebook.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

# Branch coverage of the package; apart from `make test`, since tracing slows the tests down.
coverage: $(VENV)/installed-test
	$(BIN)/python -m coverage run -m pytest $(TESTS)
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

# Compiles the kernel of this checkout again, after a change of its source.
ROOM := mergekit_select/selection
kernel:
	$(PYTHON) hatch_build.py merge_methods/$(ROOM)

# The kernel's tests, in a copy whose kernel is compiled with gcc's sanitizers and for one kind of processor: the choice
# between several is made before the sanitizers are there. Any fault ends the run. Python itself leaks on exit.
SANITIZED := build/sanitize
sanitize: $(VENV)/installed-test
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r merge_methods/mergekit_select $(SANITIZED)
	CC=gcc $(BIN)/python hatch_build.py $(SANITIZED)/$(ROOM) -g -DONE_TARGET -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=all
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=$(SANITIZED) MERGEKIT_SELECT_KERNEL=c \
		$(BIN)/python -m pytest -p no:cacheprovider --capture=sys tests/selection/test_kernels.py

# A hundred thousand hostile inputs, and stock merges under faults: docs/reliability.md tells what they found.
fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.hostile.fuzz --count 100000

faults: $(VENV)/installed-test
	$(BIN)/python -m tests.hostile.faults --kills 200 --disks 20

# Small faults put into the code, one at a time, and the tests that should find them: docs/reliability.md lists those that were
# not found. Hours; MODULES="slots.py methods.py" tries those only.
MODULES ?=
mutants: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m tests.mutants $(MODULES)

# The documentation as a site, in site/; a broken link or anchor is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Both benchmarks, and the budgets beside their figures, in a quarter of an hour. KERNEL_BENCH="--small --no-memory" times
# tensors of at most 4 Mi elements, and the headline, only.
KERNEL_BENCH ?=
BENCH_OUT ?= runs/bench
BENCH_SCRATCH ?= runs/bench-scratch
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plot]'
	$(BIN)/python benchmarks/kernel.py $(KERNEL_BENCH) --out $(BENCH_OUT)
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
