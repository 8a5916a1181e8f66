# `make` lists the targets.

VENV ?= .venv
PYTHON ?= python3
SPHINXOPTS ?= --fail-on-warning
# Pages and records name it. An archive has no Git to ask: then set it.
export COMMIT ?= $(shell git describe --always --dirty --exclude '*' 2> /dev/null)

# VENV= (empty) stands for the environment that is active.
ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: help html test record lint serve clean

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s  %s\n", $$1, $$2}' Makefile
	@echo
	@echo "VENV=DIR    the environment to create and use (now: $(VENV)); VENV= uses the active one"
	@echo "SITE_URL=URL, REPOSITORY=URL  where the site and its source will be, if anywhere"
	@echo "PYTHON=EXE  the Python to create it with (now: $(PYTHON))"

html: $(READY)  ## run the lessons that changed and build the site into _build/html
	@rm -rf _build/next
	$(RUN) -m sphinx -E -c . -d _build/doctrees $(SPHINXOPTS) docs _build/next
	@rm -rf _build/html && mv _build/next _build/html
	@echo "The site is in _build/html. To read it: make serve"

test: html  ## build the site, then run all tests
	$(RUN) -m pytest -n auto --dist worksteal

record: $(READY)  ## run the benchmarks on a GPU and write docs/results (LESSONS="NAME ...")
	$(RUN) docs/_ext/record.py $(LESSONS)

lint: $(READY)  ## check the style of the code, the spelling and the markup
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m codespell_lib
	$(RUN) -m sphinxlint --enable default-role --ignore docs/tutorials docs tutorials *.md

serve: html  ## build the site and serve it on http://localhost:8000
	$(RUN) -m http.server --bind localhost --directory _build/html 8000

clean:  ## remove what was generated (the environment stays)
	rm -rf _build docs/tutorials .pytest_cache .ruff_cache

# Problems that a newcomer can meet here get a sentence that says what to do.
$(READY): requirements.txt
	@command -v $(PYTHON) > /dev/null || \
	    { echo "$(PYTHON) was not found. Install Python 3.11 or later (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$$($(PYTHON) --version 2>&1) is too old. Name a Python of 3.11 or later: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import platform as p, sys; sys.exit((p.system(), p.machine()) not in [("Linux", "x86_64"), ("Linux", "aarch64")])' || \
	    { echo "Triton is published for Linux on x86-64 and 64-bit Arm only. On Windows use WSL; on a Mac, a Linux container."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	    { echo "$(PYTHON) cannot create environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || \
	    { echo "The requirements could not be installed: see pip's message above. torch and triton have wheels for Python 3.11 to 3.14; another Python is chosen with make PYTHON=python3.12"; exit 1; }
	@touch $@
