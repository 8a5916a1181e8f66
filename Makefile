# `make` lists the targets.

VENV ?= .venv
PYTHON ?= python3
# Pages and records name it. An archive has no Git to ask: then set it.
export COMMIT ?= $(shell git describe --always --dirty --exclude '*' 2> /dev/null)

# VENV= (empty) stands for the environment that is active.
ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
PACKAGES := active
else ifneq ($(words $(VENV)),1)
$(error VENV is "$(VENV)". It is a folder whose name has no space)
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
PACKAGES := $(READY)
endif

.PHONY: help html page test matrix targets record lint linkcheck serve clean active

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' Makefile
	@echo
	@echo "VENV=DIR    the environment to create and use (now: $(VENV)); VENV= uses the active one"
	@echo "SITE_URL=URL, REPOSITORY=URL  where the site and its source will be, if anywhere"
	@echo "PYTHON=EXE  the Python to create it with (now: $(PYTHON))"

html: $(PACKAGES)  ## run the lessons that changed and build the site into _build/html
	@$(RUN) docs/_ext/build.py $(SPHINXOPTS)

page: $(PACKAGES)  ## run one lesson and make its page alone, in _build/page (LESSON=NAME)
	@$(RUN) docs/_ext/build.py --lesson=$(LESSON) $(SPHINXOPTS)

test: html  ## build the site, then run all tests
	@$(RUN) docs/_ext/packages.py pytest pytest-xdist beautifulsoup4 nbclient ipykernel
	$(RUN) -m pytest -n auto --dist worksteal

matrix: $(PACKAGES)  ## run the lessons' tests with other versions of Triton (TRITON="3.9.0 ...")
	$(RUN) tests/matrix.py $(TRITON) $(LESSONS)

targets: $(PACKAGES)  ## compile the kernels for GPUs that need not be here
	$(RUN) tests/targets.py $(LESSONS)

record: $(PACKAGES)  ## run the benchmarks on a GPU and write docs/results (LESSONS="NAME ...")
	PYTHONPATH=docs/_ext:$$PYTHONPATH $(RUN) -m benchmarks $(LESSONS)

lint: $(PACKAGES)  ## check the style of the code, the spelling and the markup
	@$(RUN) docs/_ext/packages.py ruff codespell sphinx-lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m codespell_lib
	$(RUN) -m sphinxlint --enable default-role --ignore docs/tutorials docs tutorials *.md

linkcheck: html  ## ask the network whether the links to other sites still lead somewhere
	$(RUN) -m sphinx -q -b linkcheck -c . -d _build/doctrees docs _build/linkcheck

serve: html  ## build the site and serve it on http://localhost:8000
	$(RUN) -m http.server --bind localhost --directory _build/html 8000

clean:  ## remove what was generated (the environment stays)
	rm -rf _build docs/tutorials .pytest_cache .ruff_cache

active:
	@$(RUN) docs/_ext/packages.py

# Problems that a newcomer can meet here get a sentence that says what to do. The file "ready" beside
# "pyvenv.cfg" marks an environment that was made here, and is old until all is installed.
$(READY): requirements.txt
	@command -v $(PYTHON) > /dev/null || \
	    { echo "$(PYTHON) was not found. Install Python 3.11 or later (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$$($(PYTHON) --version 2>&1) is too old. Name a Python of 3.11 or later: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import platform as p, sys; sys.exit((p.system(), p.machine()) not in [("Linux", "x86_64"), ("Linux", "aarch64")])' || \
	    { echo "Triton is published for Linux on x86-64 and 64-bit Arm only. On Windows use WSL; on a Mac, a Linux container."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	    { echo "$(PYTHON) cannot create environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -z "$$(ls -A $(VENV) 2> /dev/null)" || test -e $@ -a -e $(VENV)/pyvenv.cfg || \
	    { echo "$(VENV) has files that make did not put there, and would be emptied. Name a folder that is new, or activate your own environment and say: make $(MAKECMDGOALS) VENV="; exit 1; }
	@mkdir -p $(VENV) && touch -d @0 $@ && find "$(VENV)/" -mindepth 1 ! -path $@ ! -path $(@D)/pyvenv.cfg -delete
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || \
	    { echo "The requirements could not be installed: see pip's message above. torch and triton have wheels for Python 3.11 to 3.14; another Python is chosen with make PYTHON=python3.12"; exit 1; }
	@touch $@
