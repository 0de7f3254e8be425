# make demo   prune a shipped model and show the table        make test   the test suite (no GPU needed)
# make lint   ruff and mypy                                   make build  compile csrc into shedder/_lib
# make bench  the benchmarks                                  make clean  remove .venv and everything built
#
# Each makes .venv, installs what requirements-dev.txt pins, and compiles what changed. SHEDDER_CUDA_ARCHS (90a; all;
# none) says for which GPUs; unset: those visible here. PYTHON names the interpreter of .venv. FAMILY=mamba1
# gives the demo the other shipped model.

PYTHON ?= python3
PYTEST_ARGS ?=
FAMILY ?= mamba2
TRITON := triton==3.6.0

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -qq
# Two stamps: what is installed, and what is compiled for which GPUs.
READY := $(VENV)/installed
comma := ,
BUILT := $(VENV)/built-for-$(or $(subst ;,$(comma),$(subst $() ,$(comma),$(SHEDDER_CUDA_ARCHS))),visible)
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type d -o -name "*.cpp" -o -name "*.h" -o -name "*.cu*")

.PHONY: demo test test-slow test-gpu lint build bench clean
.DEFAULT_GOAL := build

build: $(BUILT)

demo: $(BUILT)
	$(RUN) demo/demo.py --family $(FAMILY)

test: $(BUILT)
	$(RUN) -m pytest -m "not gpu and not slow" $(PYTEST_ARGS)

test-slow: $(BUILT)
	$(RUN) -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(BUILT)
	$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(BUILT)
	$(RUN) -m pytest bench $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist shedder/_lib shedder.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "shedder needs Python 3.10 or later; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@test -n "$(CXX)" && command -v $(firstword $(CXX)) >/dev/null || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "no C++ compiler found (c++, g++, clang++). On Debian: apt-get install g++" >&2; exit 1; }
	@test -x $(RUN) && $(RUN) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements-dev.txt into $(VENV) (once; minutes)"
	$(INSTALL) -r requirements-dev.txt
	@$(RUN) -c 'import triton' 2>/dev/null || $(INSTALL) $(TRITON)
	@touch $@

# --no-build-isolation: torch is in .venv already, and pip would fetch it once more into an isolated environment.
$(BUILT): $(READY) $(SOURCES)
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@$(RUN) -c 'from shedder import native; print("CPU library:", native.cpu_status()); print("CUDA library:", native.cuda_status())'
	@rm -f $(VENV)/built-for-*
	@touch $@
