# Needs make and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= python3
# More than two cores: tests wait for machines and clouds more than they compute.
PYTEST_WORKERS ?= 4
# System packages to install first, where make runs as root and apt is there: for tests on machines in a box, some of
# which have other login shells, and for those in a browser, which need some font.
APT_PACKAGES ?= fuse3 iproute2 nftables openssh-client openssh-server procps rclone fish tcsh zsh \
    chromium chromium-driver fonts-dejavu-core

VENV := .venv
VENV313 := .venv313
FRAMEWORKS := .venv-frameworks
DOCS := .venv-docs
BIN := $(VENV)/bin
EVERYDAY := not soak and not gpu
# Frameworks for training have an environment of their own: they are large, and not to be had for every Python.
PLAIN := --ignore tests/frameworks

# A virtual environment knows its folder and its Python: when either is another one, or gone, it is made again.
MADE_FOR := $(CURDIR) $(PYTHON)
made_for = $(shell $(1)/bin/python -c pass 2>/dev/null && cat $(1)/.made-for 2>/dev/null)
ifneq ($(call made_for,$(VENV)),$(MADE_FOR))
.PHONY: $(VENV)/.made-for
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-frameworks test-313 test-gpu soak bench docs links lint types clean system-packages

help: ## Show this list
	@echo "Targets (PYTHON=$(PYTHON), PYTEST_WORKERS=$(PYTEST_WORKERS)):"
	@sed -n 's/^\([a-z0-9-]*\):.*## /  \1|/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## Search a grid with scikit-learn on a pool of local workers
	@$(BIN)/python examples/demo_grid_search.py

test: $(VENV)/.test ## Run the tests; their fast part again on Python 3.13 where there is one
	@$(BIN)/python --version
	@tools/run-tests $(VENV) -m "$(EVERYDAY)" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PLAIN)
	@$(MAKE) --no-print-directory test-frameworks
	@$(MAKE) --no-print-directory test-313
	@for venv in $(VENV) $(FRAMEWORKS) $(VENV313); do \
	    if [ -f $$venv/.closing-line ]; then $$venv/bin/python --version; cat $$venv/.closing-line; fi; \
	done

test-fast: $(VENV)/.test ## Run the fast part of the tests
	@$(BIN)/python --version
	@tools/run-tests $(VENV) -m "not slow and $(EVERYDAY)" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PLAIN)

test-frameworks: ## Test distributed training with torch, JAX, Keras, TensorFlow, Transformers, XGBoost, where they can be installed
	@$(MAKE) --no-print-directory $(FRAMEWORKS)/.frameworks VENV=$(FRAMEWORKS)
	@$(FRAMEWORKS)/bin/python --version
	@cat $(FRAMEWORKS)/.frameworks
	@tools/run-tests $(FRAMEWORKS) tests/frameworks -m "$(EVERYDAY)" -n 2 --dist loadfile

test-313: $(VENV)/.test
	@rm -f $(VENV313)/.closing-line
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))'; then \
	    echo "Not tested a second time on Python 3.13: it is the one in $(VENV)."; \
	elif python=$$(tools/find-python 3.13); then \
	    $(MAKE) --no-print-directory $(VENV313)/.test VENV=$(VENV313) PYTHON="$$python" && \
	    $(VENV313)/bin/python --version && \
	    tools/run-tests $(VENV313) -m "not slow and $(EVERYDAY)" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PLAIN); \
	else \
	    echo "Not tested on Python 3.13: none found that runs and can make virtual environments."; \
	fi

test-gpu: $(VENV)/.gpu ## Run the tests that need an NVIDIA GPU; without one they are skipped
	@$(BIN)/python -m pytest -m gpu tests/gpu -rs

soak: $(VENV)/.test ## Kill parts of pools on machines at random moments (SOAK_RUNS=50; SOAK_SEED=... repeats a run)
	@$(BIN)/python -m pytest -m soak tests/soak -s -q

bench: $(VENV)/.bench ## Compare the speed of skyward, Dask, loky and Ray (BENCH='--rounds 5 --only latency')
	@$(BIN)/python benchmarks/bench.py $(BENCH)

lint: $(VENV)/.test types ## Check spelling, style, types and which module may import which
	@$(BIN)/codespell
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo

docs: ## Build the documentation into build/site; warnings, such as broken links, are errors
	@$(MAKE) --no-print-directory $(DOCS)/.docs VENV=$(DOCS)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict --site-dir build/site
	@echo "Documentation: build/site/index.html"

links: ## Check that the external links of the documentation work; needs the network
	@tools/check-links

types: $(VENV)/.test ## Check types, and that all public names have them
	@$(BIN)/mypy
	@$(BIN)/python tools/check-public-types

clean: ## Remove environments, caches and build outputs
	rm -rf $(VENV) $(VENV313) $(FRAMEWORKS) $(DOCS) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What another distribution has not, such as a browser that is no snap, is left out; its tests say so.
system-packages:
	@if [ -n "$(strip $(APT_PACKAGES))" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    dpkg -s $(APT_PACKAGES) >/dev/null 2>&1 || \
	    { apt-get update -q && apt-get install -qy --no-install-recommends \
	        $$(apt-cache pkgnames | grep -Fx $(APT_PACKAGES:%=-e %)); }; \
	fi

# Each stamp is written last: what was interrupted is done again.
$(VENV)/.made-for:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "skyward needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not: $$($(PYTHON) --version 2>&1)."; \
	    found=$$(tools/find-python 3.13 || tools/find-python 3.12 || tools/find-python 3.11) && \
	    echo "Found here: $$found. Try: make PYTHON=$$found $(MAKECMDGOALS)"; \
	    exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@printf '%s' '$(MADE_FOR)' > $@

$(VENV)/.demo: pyproject.toml $(VENV)/.made-for
	@echo "Installing skyward with scikit-learn into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sklearn]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made-for | system-packages
	@echo "Installing skyward and what its tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.gpu: $(VENV)/.test
	@echo "Installing what asks NVIDIA's driver into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,gpu]'
	@touch $@

$(VENV)/.frameworks: pyproject.toml tools/install-frameworks $(VENV)/.made-for
	@echo "Installing skyward and frameworks for training into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sklearn]' pytest pytest-timeout pytest-xdist hypothesis
	@tools/install-frameworks $(VENV) > $@
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.made-for
	@echo "Installing what builds the documentation into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.made-for
	@echo "Installing skyward and what it is compared with into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]' || { \
	    echo "Trying again without Ray."; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'; }
	@touch $@
