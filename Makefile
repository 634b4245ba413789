# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DATA := $(CURDIR)/data/ucf101_demo

# pip compiles on one core; compileall, below, on all.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo examples test lint docs bench clean

help: ## Show what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.installed-demo ## Nine video models on real clips under a small memory budget, on this machine
	$(BIN)/python examples/make_demo_data.py $(DEMO_DATA)
	$(BIN)/tune-easytrain run configs/ucf101_demo.yaml --set config.data.root=$(DEMO_DATA)

examples: $(VENV)/.installed-examples ## Language models and vision-language models, small, on this machine
	$(BIN)/tune-easytrain run configs/max_crops_demo.yaml
	$(BIN)/tune-easytrain run configs/lm_finetune_demo.yaml
	$(BIN)/tune-easytrain run configs/vlm_true_batch_demo.yaml

test: $(VENV)/.installed-test ## Run the tests (no GPU needed)
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

lint: $(VENV)/.installed-dev ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs ## Build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(VENV)/.installed-demo ## Measure the overhead of a trial on this machine
	$(BIN)/python benchmarks/trial_overhead.py

clean: ## Remove the virtual environment and what was made
	rm -rf $(VENV) build data runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages hold templates that are no Python
	touch $@
