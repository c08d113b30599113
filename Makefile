# Targets; each sets up what it needs in .venv.
#
#   make quickstart                       SYN2REAL and sequential editing on
#                                         speech that is synthesised here
#   make quickstart DATA=<fsdd folder>    the same on real recordings
#   make quickstart MODEL=<whisper> DATA=<corpus>
#                                         the same with a Whisper, a folder or
#                                         a hub name, on two of its domains
#   make test                             everything that needs no GPU
#   make lint                             what the linters say
#   make docs                             the pages, build/docs/index.html
#   make tutorials                        runs the notebooks of docs/tutorials
#                                         and keeps their outputs
#   make tutorials TUTORIAL="<name> DATA=<corpus> MODEL=<whisper>"
#                                         one of them, with other values in its
#                                         first cell; paths count from here

PYTHON ?= python3
VENV ?= .venv
DATA ?=
MODEL ?=
SPOKEN ?=
TUTORIAL ?=
OUTPUT ?= results
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# Two processes of one thread each: small models gain nothing from more
# threads a process, and results do not depend on the number of cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint docs tutorials install install-dev clean

ifeq ($(MODEL),)
quickstart: $(VENV)/.installed
	$(BIN)/python recipes/FSDD/ASR/quickstart.py --output "$(OUTPUT)" \
		$(if $(DATA),--data "$(DATA)")
else
quickstart: $(VENV)/.installed-whisper
	$(BIN)/python recipes/FilletsNG/ASR/whisper/quickstart.py \
		--model "$(MODEL)" --data "$(DATA)" --output "$(OUTPUT)" \
		$(if $(SPOKEN),--language "$(SPOKEN)")
endif

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint --strict .
	$(BIN)/codespell speechbrain_taskarith recipes hparams tests docs \
		benchmarks examples .github *.md *.cff setup.cfg Makefile

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -c docs --fail-on-warning --keep-going --quiet \
		-d build/doctrees . build/docs
	@echo "build/docs/index.html"

tutorials: $(VENV)/.installed-tutorials
	$(BIN)/python docs/tutorials/run.py $(if $(TUTORIAL),--folder . $(TUTORIAL))

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed; name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[recipes]"
	@touch $@

$(VENV)/.installed-whisper: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt \
		-e ".[recipes,huggingface]"
	@touch $@

$(VENV)/.installed-dev: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
$(VENV)/.installed-tutorials: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[tutorials]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
