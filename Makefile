# make setup | demo | test | test-slow | format | style | lab | export | clean.   Options: PYTHON=python3.12  ARGS="--seed 1"
# make test JOBS=2 THREADS=1: so many of its parts run side by side (the two halves of the notebooks, then as many
# processes of pytest), each with so many threads of torch; JOBS=1 THREADS=2 takes one after another.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.dera-installed
JOBS ?= 2
THREADS ?= 1
# parts that run side by side print one after another, where make knows how
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
unexport MPLBACKEND

.PHONY: site setup demo test test-slow test-style test-tree test-notebooks test-lessons test-rooms test-pytest format style lab export clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# Runs again only when what it installs has changed, and picks up where an interrupted installation stopped.
$(STAMP): setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("dera needs Python 3.10 or newer and $(PYTHON) is %d.%d; name a newer one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" % v[:2] if v < (3, 10) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making .venv; torch and the rest are several GB, so the first time takes minutes"; $(PYTHON) -m venv --clear .venv; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77' wheel
	@set -o pipefail; PYTHONWARNINGS=ignore $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[dev,play]' -c constraints.txt | { grep -vE '^(Requirement already satisfied|  )' || true; }
	@touch $@; echo "installed in .venv"

demo: setup
	$(BIN)/dera demo $(ARGS)

# Every part runs even if an earlier one fails; each prints its time; the exit code tells whether all passed.
test: setup
	@failed=0; \
	$(MAKE) --no-print-directory -k -j$(JOBS) $(SYNC) test-style test-tree || failed=1; \
	$(MAKE) --no-print-directory test-notebooks || failed=1; \
	$(MAKE) --no-print-directory test-pytest || failed=1; \
	exit $$failed

timed = start=$$SECONDS; $(2); code=$$?; echo "== $(1): $$((SECONDS - start)) s, $$([ $$code = 0 ] && echo passed || echo FAILED)"; exit $$code

# What is read by people: notebooks, tests and setup.py; dera/ is written from them.
test-style: setup
	@$(call timed,style and floors,$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet . && $(BIN)/lint-imports --no-cache)

test-tree: setup
	@$(call timed,the committed tree is what the notebooks export,$(BIN)/python tests/check_tree.py)

nbdev_test = OMP_NUM_THREADS=$(THREADS) $(BIN)/nbdev_test --n_workers 1 --do_print --timing $(NBFLAGS)
# nbdev passes over folders whose names begin like this
ROOMS := runtime|tools|solutions

test-notebooks: setup
	@$(MAKE) --no-print-directory -k -j$(JOBS) $(SYNC) test-lessons test-rooms
	@$(if $(findstring slow,$(NBFLAGS)),,grep -rlE --include='*.ipynb' '"#\| *(slow|gpu)' nbs | sed 's/^/cells flagged slow or gpu were left out of /' || true)

test-lessons: setup
	@$(call timed,notebooks of the lessons,$(nbdev_test) --path nbs --skip_folder_re '^([_.]|($(ROOMS))$$)')

test-rooms: setup
	@$(call timed,notebooks of the rooms and the solutions,failed=0; for room in $(subst |, ,$(ROOMS)); do $(nbdev_test) --path nbs/$$room || failed=1; done; (exit $$failed))

# Modules stay whole, as their tests share what takes long to make.
test-pytest: setup
	@$(call timed,pytest,OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(if $(filter 1,$(JOBS)),,-n $(JOBS) --dist loadfile --no-loadscope-reorder) -rs --durations=10 tests $(ARGS))

# The same notebooks with the cells flagged slow, which `make test` leaves out.
test-slow: setup
	@$(MAKE) --no-print-directory test-notebooks NBFLAGS="--flags slow"

format: setup
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

# The counts that style is held to, and those of the lessons.
style: setup
	@$(BIN)/python tests/style_counts.py

lab: setup
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) nbs/00_tour.ipynb

# Notebooks -> dera/ and README.md; run it before a commit.
export: setup
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/render_readme.py

# Caches and build leftovers; .venv, runs/ and data/ stay.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
	find dera tests nbs -name __pycache__ -type d -prune -exec rm -rf {} +

# The course as static pages in site/: open site/index.html, no server and no network needed.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
