# make quickstart, make test: on a machine with Python >= 3.11 and make, these set up all they need in .venv.
#
# Without an NVIDIA GPU the pinned torch below is installed first. Where the package index would give a CUDA build of
# it (several GB), point pip at the CPU builds: make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PY := $(VENV)/bin/python
TORCH_CPU ?= torch==2.13.0
TORCH_ARGS ?=
EXTRAS ?= test
ARGS ?=
# Processes that share the tests, a file at a time, one thread each. WORKERS=0: all in one process, with torch's threads.
WORKERS ?= 2

.PHONY: help quickstart quickstart-short test lint aot bench bench-setup clean
help:
	@echo "make quickstart | quickstart-short | test | lint | aot | bench | bench-setup | clean"

$(VENV)/.installed: pyproject.toml setup.py
	@set -e; \
	for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "fastrl needs Python >= 3.11; install it or say make PYTHON=/path/to/python" >&2; exit 1; fi; \
	if [ ! -x $(PY) ]; then echo "making $(VENV) with $$found"; $$found -m venv $(VENV); fi
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "an NVIDIA GPU is visible: torch comes with CUDA"; \
	else \
	  echo "no NVIDIA GPU: installing $(TORCH_CPU)"; $(PY) -m pip install -q $(TORCH_ARGS) "$(TORCH_CPU)"; \
	fi
	$(PY) -m pip install -q -e ".[$(EXTRAS)]"
	@touch $@

quickstart: $(VENV)/.installed
	$(PY) -m fastrl quickstart $(ARGS)

quickstart-short: $(VENV)/.installed
	$(PY) -m fastrl quickstart --short $(ARGS)

test: $(VENV)/.installed
	$(if $(filter 0,$(WORKERS)),,OMP_NUM_THREADS=1) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check .

aot: $(VENV)/.installed
	$(PY) bench/aot_check.py

bench: bench-setup
	$(PY) bench/must_hold.py
	$(PY) bench/sweep.py
	$(PY) bench/tables.py

bench-setup: $(VENV)/.installed
	$(PY) -m pip install -q -e ".[test,bench]"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
