# `make help` lists the targets. Every path is relative, so the folder's own path may contain spaces.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo test lab readme
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1  \t/p' Makefile

install: $(STAMP) ## create .venv with the tested versions (PYTHON=python3.12 picks an interpreter)

# The stamp is written last: an interrupted install starts again, a finished one is not repeated.
$(STAMP): settings.ini pyproject.toml setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train the tiny editor on the shape world, evaluate, and show where the results are
	$(BIN)/mtef_train --notebook experiments/train.ipynb --run runs/demo

test: $(STAMP) ## test every notebook, then the whole flows
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lab: $(STAMP) ## open the notebooks
	$(BIN)/jupyter lab

readme: $(STAMP) ## render README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py
