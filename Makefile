# Two commands: `make quickstart` and `make test`. Each sets up .venv by itself.
#
#   PYTHON=python3.12                              another Python (3.10 to 3.14)
#   TORCH="torch==2.13.0"                          which torch to install (pip's words; for example a CPU build:
#   TORCH="torch --index-url https://download.pytorch.org/whl/cpu")
#   PIP_CONSTRAINT=file                            pip's own variable is honoured
#   ARGS="--preset 7b --batch 2 --seq 1024"        `make bench` times the training step beside its peers: what, and which
#   LANGS=1                                        quickstart: English, Chinese and Japanese beside Python
#   OPENLLAMA_CUDA=0                               leave the CUDA kernels out of the build
#   CXX, CUDA_HOME, MAX_JOBS                       compiler, toolkit, parallel compiles

PYTHON ?= python3
export TORCH ?= torch>=2.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LANGUAGES := $(filter-out 0,$(LANGS))
NATIVE := $(shell find csrc -type f)

# .venv/.torch holds the TORCH it was made with. Another one, given in the environment or on the command line,
# installs that torch; where none is given, the torch that is there stays.
ifneq ($(origin TORCH),file)
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/.torch
endif
endif

.PHONY: quickstart test lint format bench bench-ops report clean

quickstart: $(VENV)/.ready$(LANGUAGES:%=-langs)
	$(BIN)/python -m train.quickstart $(LANGUAGES:%=--config train/configs/tiny-langs.yaml)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.tokens_per_second $(ARGS)

bench-ops: $(VENV)/.ready-dev
	$(BIN)/python -m pytest benchmarks/ops

report: $(VENV)/.ready
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf build $(VENV) kernels/*.so openllama/data/*.so *.egg-info

# torch first and by itself: the build takes the one that is installed, and fetches no second one.
$(VENV)/.torch:
	@command -v $${CXX:-g++} >/dev/null || { echo "openllama: $${CXX:-g++} is missing: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++) or name a compiler in CXX" >&2; exit 1; }
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v else f"openllama: Python {v[0]}.{v[1]} is too old: takes 3.10 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip "setuptools>=77" ninja pybind11 numpy
	@test ! -e $@ || $(PIP) uninstall -q -y torch
	$(PIP) install $$TORCH
	@echo "$$TORCH" >$@

$(VENV)/.ready: $(VENV)/.torch setup.py pyproject.toml $(NATIVE)
	$(PIP) install -q --no-build-isolation -e ".[train,bench]"
	@touch $@

$(VENV)/.ready-langs: $(VENV)/.ready
	$(PIP) install -q --no-build-isolation -e ".[train,bench,langs]"
	@touch $@

# all at once: after .ready's, a second build and a second round of pip would take a minute
$(VENV)/.ready-dev: $(VENV)/.torch setup.py pyproject.toml $(NATIVE)
	$(PIP) install -q --no-build-isolation -e ".[train,bench,dev]"
	@touch $(VENV)/.ready $@
