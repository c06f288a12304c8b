# `make help` lists the targets. Every path is relative, so the folder's own path may contain spaces.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo browser test fast lint export docs lab readme
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
	$(BIN)/mtef_train --notebook experiments/train.ipynb preset=self-imitation num_steps=2 eval_steps=3 lr=0.002 iterations=563 --run runs/demo
	@$(BIN)/python experiments/recipe.py --show mt-editflow

# Only where it can be done without asking: as root, on a system with apt-get. Without a browser its tests are skipped, and say so.
browser: ## install the system's Chromium, which tests drive JupyterLab with
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  echo 'No Chromium, and it cannot be installed from here: tests in a browser will be skipped.'

# Chapters and flows in one pool of processes; each takes the next test when it is done, the longest first (tests/conftest.py).
# As many processes as the two cores that the time limit is for.
# Where bytecode is not written, each of the processes would compile the package again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadscope --no-loadscope-reorder

test: $(STAMP) browser ## test every notebook, and the whole flows
	$(PYTEST) -n 2 -rs --durations=25

fast: $(STAMP) lint ## what one runs between edits: lint, the light chapters, and the tests of the house
	$(PYTEST) -n 2 -q tests/test_chapters.py tests/test_notebooks.py tests/test_sessions.py -k 'not test_chapter or nbs/data or nbs/algorithm'

lint: $(STAMP) ## how the code reads: lines, names, unused things
	$(BIN)/ruff check .

export: $(STAMP) ## export the package from the notebooks, clean the notebooks, render README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

# Sphinx is an extra: an environment that only trains does without it.
docs: $(STAMP) ## build the site into _docs/html
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/build.py

lab: $(STAMP) ## open the notebooks
	$(BIN)/jupyter lab

readme: $(STAMP) ## render README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py
