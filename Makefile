# Two commands do everything: `make demo` and `make test`. Both build .venv first, once.
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS and LAB_ARGS reach pip and JupyterLab.
.DEFAULT_GOAL := help
.PHONY: help demo test lab notebooks bench clean env env-dev

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PIP_ARGS ?=
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
SOURCES := settings.ini setup.py pyproject.toml constraints.txt

# Nothing is written into the home folder, and nothing is downloaded unless it is asked for.
CACHE := $(CURDIR)/.cache
export JUPYTER_CONFIG_DIR := $(CACHE)/jupyter
export JUPYTER_DATA_DIR := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHE)/jupyter/runtime
export IPYTHONDIR := $(CACHE)/ipython
export MPLCONFIGDIR := $(CACHE)/matplotlib
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 MPLBACKEND=agg

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

demo: $(VENV)/.installed  ## train a tiny CMMD, generate clips, write runs/demo/index.html
	@$(OFFLINE) $(BIN)/cmmd demo --out runs/demo --overwrite

test: $(VENV)/.installed-dev  ## export check, ruff, every notebook, pytest
	@$(OFFLINE) $(BIN)/python tests/run_all.py

lab: $(VENV)/.installed-dev  ## JupyterLab on the notebooks; saving cleans them
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/00_core.ipynb \
	  --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(LAB_ARGS)

notebooks: $(VENV)/.installed-dev  ## run all notebooks in place, keep their outputs, export the modules
	@$(BIN)/python tests/run_notebooks.py $(NB)

bench: $(VENV)/.installed  ## speed of network, training and data on this machine, into runs/*.json
	@$(OFFLINE) $(BIN)/python benchmarks/speed.py --out runs/bench.json $(SPEED_ARGS)
	@$(OFFLINE) $(BIN)/python benchmarks/train.py --out runs/train.json
	@$(OFFLINE) $(BIN)/python benchmarks/loader.py --out runs/loader.json

env: $(VENV)/.installed  ## only the environment
env-dev: $(VENV)/.installed-dev  ## only the environment, with the development tools

clean:  ## caches and builds; .venv and runs/ stay
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info _proc
	find cmmd nbs tests benchmarks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	    || continue; \
	  echo "Creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); exit 1; \
	done; \
	echo "cmmd needs Python 3.11 or newer with its venv module, and found none: install it" \
	  "(Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "Installing the tested versions into $(VENV) (once; about 2 minutes and 6 GB)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	@echo "Installing the tested versions and the development tools into $(VENV) (once; about 2 minutes and 6 GB)"
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
