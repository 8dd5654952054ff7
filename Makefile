# EoRA Lab. `make help` lists the commands; the first one also makes the environment (.venv).

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := eval,llamacpp,lab,docs,dev
INTEROP := build/interop
# of other tools, for `make interop` alone
OTHERS := bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8.post1
# for `make ray` alone; on a cluster, the one that runs there
RAY := ray==2.60.0

help: ## list the commands
	@grep -hE '^[a-z.]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-16s %s\n", $$1, $$2}'

demo: $(BIN)/eora-lab ## compress and compensate a real language model, with a table and a figure
	$(BIN)/eora-lab demo

figures: $(BIN)/eora-lab ## draw the committed figures again from recorded numbers
	$(BIN)/python -m figures.rebuild

test: lint unit ## all tests
	$(BIN)/pytest -n 2 -m kernels
	$(BIN)/pytest -m real
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m notebooks
	$(BIN)/pytest -m browser

unit: $(BIN)/eora-lab ## the tests that need no language model
	$(BIN)/pytest -n 2 -m "not real and not kernels and not notebooks and not browser and not interop"

interop: $(INTEROP)/bin/pytest ## test against other tools, in an environment of their own (build/interop)
	$(INTEROP)/bin/pytest -m interop tests/test_interop_*.py

ray: $(BIN)/eora-lab ## install Ray into the environment, for sweeps on many machines, and try it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' $(RAY)
	$(BIN)/pytest tests/test_ray.py

lab: $(BIN)/eora-lab ## open JupyterLab at the first notebook (ARGS="..." is passed on)
	@$(BIN)/python -m docs.lab $(ARGS)

class: $(BIN)/eora-lab ## write class.zip: the lessons with their recorded outputs and results, so that a class does not wait
	$(BIN)/python -m docs.handout

site: $(BIN)/eora-lab ## write the site to site/: notebooks with recorded outputs, guides, reference; open site/index.html
	$(BIN)/python -m docs.build

record: $(BIN)/eora-lab ## run the notebooks at full size and keep their outputs for the site (ARGS="00 02": these; else what is out of date)
	$(BIN)/python -m docs.record $(ARGS)

numbers: $(BIN)/eora-lab ## check the numbers of the README by what is recorded (ARGS="--measure" runs its commands, hours)
	$(BIN)/python -m docs.numbers $(ARGS)

families: $(BIN)/eora-lab ## try every family of transformers that is not recorded yet, and write docs/families.md (ARGS="llama" or "--again")
	$(BIN)/python -m docs.families $(ARGS)

fuzz: $(BIN)/eora-lab ## look for inputs that are silently taken wrong, some minutes (ARGS="..." is passed on)
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(BIN)/eora-lab ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

environment.yml: constraints.txt ## rewrite the conda environment from constraints.txt
	@{ echo 'name: eora-lab'; echo 'channels: [conda-forge]'; echo 'dependencies:'; \
	echo '  - python>=3.11,<3.14'; echo '  - pip'; echo '  - pip:'; \
	sed 's/.*/      - "&"/' constraints.txt; echo '      - --editable .[$(EXTRAS)]'; } > $@

# The environment: remade when the package list changes. Built aside the name that counts, so that an interrupted
# install is done again.
$(BIN)/eora-lab: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "EoRA Lab needs Python 3.11, 3.12 or 3.13; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@rm -f $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(INTEROP)/bin/pytest: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(INTEROP)
	@rm -f $@
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' $(OTHERS)
	@touch $@

.PHONY: help demo figures test unit interop ray lab class site record numbers families fuzz lint
.DELETE_ON_ERROR:
