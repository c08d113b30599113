# Targets; each sets up what it needs in .venv.
#
#   make quickstart                       the main job on speech made here
#   make quickstart DATA=<fsdd folder>    the same on real recordings
#   make test                             everything that needs no GPU

PYTHON ?= python3
VENV ?= .venv
DATA ?=
OUTPUT ?= results
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# Two processes of one thread each: small models gain nothing from more
# threads a process, and results do not depend on the number of cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test install install-dev clean

quickstart: $(VENV)/.installed
	$(BIN)/python recipes/FSDD/ASR/quickstart.py --output "$(OUTPUT)" \
		$(if $(DATA),--data "$(DATA)")

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed; name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[recipes]"
	@touch $@

$(VENV)/.installed-dev: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
