# One environment, made once: each stamp records what is already installed in it.
# On a machine with a GPU choose another build: make demo TORCH="torch==2.13.0 --index-url <wheel index>".
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# How much `make veena` does: tiny (a smoke test), quick (some minutes) or full (the tables of the docs).
PRESET ?= quick
MODELS := tiny-llava-emotion tiny-qwen2vl-emotion

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -qq

.DEFAULT_GOAL := help
.PHONY: help explore demo veena test fuzz browser check docs docs-serve notebooks notebooks-save bench refresh clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(STAMPS)/demo  ## look inside both embedded models, patch and steer them: out/demo/index.html
	@$(BIN)/veena-lens demo --out out/demo

# Both models at once, one core each, since models this small gain little from a second thread; each line says whose it is.
veena: $(STAMPS)/demo  ## locate and enhance the emotion circuit of both models, minutes: out/veena-quick/
	@mkdir -p out/veena-$(PRESET); export OMP_NUM_THREADS=1; \
	for model in $(MODELS); do \
	  folder=out/veena-$(PRESET)/$$model; rm -f $$folder.failed; \
	  { $(BIN)/veena-lens run --model $$model --preset $(PRESET) --out $$folder 2>&1 || touch $$folder.failed; } \
	    | awk -v name="$$model  " '{ print name $$0; fflush() }' & \
	done; wait; test -z "$$(ls out/veena-$(PRESET)/*.failed 2>/dev/null)"
	@echo "reports: $(patsubst %,out/veena-$(PRESET)/%/report.html,$(MODELS))"

explore: $(STAMPS)/explore  ## look inside the embedded models in the browser, with your own images
	$(BIN)/veena-lens explore

test: $(STAMPS)/test  ## the tests (slow and GPU ones excluded)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

# How often `make fuzz` changes a file of every kind; the tests do it a few times.
CHANGES ?= 2000

fuzz: $(STAMPS)/test  ## files of every kind, changed at random: each loads or is refused by name
	VEENA_FUZZ=$(CHANGES) $(BIN)/python -m pytest -n auto --maxprocesses 8 tests/test_fuzzed_files.py

browser: $(STAMPS)/browser  ## the explorer and the site in a real browser: Chromium must be installed
	$(BIN)/python -m pytest -m browser tests/app

check: $(STAMPS)/dev  ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: $(STAMPS)/docs  ## the documentation: site/index.html
	@$(BIN)/mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(STAMPS)/docs  ## the documentation at http://127.0.0.1:8000/, built again at every change
	$(BIN)/mkdocs serve

notebooks: $(STAMPS)/notebooks  ## run every notebook from top to bottom, and compare with its kept outputs
	$(BIN)/python docs/notebooks.py

notebooks-save: $(STAMPS)/notebooks  ## run every notebook, and keep its outputs
	$(BIN)/python docs/notebooks.py --save

bench: $(STAMPS)/base  ## tables of speed and memory ratios
	$(BIN)/python -m veena_lens.benchmarks

refresh: $(STAMPS)/browser $(STAMPS)/notebooks  ## every picture, output and generated table of README, docs and notebooks
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/screenshot.py
	$(BIN)/python docs/fill.py
	$(BIN)/python docs/outputs.py
	$(BIN)/python docs/notebooks.py --save

clean:  ## remove what these commands wrote, the environment aside
	rm -rf out site build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "veena_lens needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1)." >&2; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

# torch comes first and alone: the package asks only for torch>=2.6, so that no later step fetches another build.
$(STAMPS)/torch: $(STAMPS)/python
	@echo "installing $(TORCH)"
	$(PIP) $(TORCH)
	@touch $@

$(STAMPS)/base: $(STAMPS)/torch pyproject.toml
	@echo "installing veena_lens"
	$(PIP) -e .
	@touch $@

$(STAMPS)/demo $(STAMPS)/explore $(STAMPS)/test $(STAMPS)/browser $(STAMPS)/dev $(STAMPS)/docs $(STAMPS)/notebooks: $(STAMPS)/%: $(STAMPS)/base
	@echo "installing what '$*' needs"
	$(PIP) -e '.[$*]'
	@touch $@
