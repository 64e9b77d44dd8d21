# What people type. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
# More flags for pip, for instance an index that serves the CPU build of torch.
PIP_FLAGS ?=
# Test processes; each uses one thread, so that results do not depend on how a sum was split.
JOBS ?= 2
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
# A checkout of the published code of SafeCoDe.
PUBLISHED ?=
BENCH_FLAGS ?=
INJECTION_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cpu/loops/* csrc/cuda/*)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(PYTEST_FLAGS)
TRITON_FLAGS ?=
LINTED := safecode_kernels python tests benchmarks scripts setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv gpu-report-kernels gpu-report-generate demo test test-all test-matrix test-triton test-published support-table test-cuda-build sanitize sanitize-cpu lint format dist bench-hazard-world bench-judges injection clean clean-all

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## create the environment, or update it after a change of its versions

# The torch pin must reach pip: an open range would pull a CUDA build of several gigabytes. __init__.py holds the version.
$(INSTALLED): pyproject.toml setup.py constraints.txt safecode_kernels/__init__.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[hf,judges,bench,dev]'
	@touch $@

demo: $(INSTALLED) ## run Hazard World: a table of all arms, and a contact sheet in out/demo
	$(BIN)/safecode-mllm demo $(DEMO_FLAGS)

test: $(INSTALLED) ## run the fast tests
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED) ## run every test, then the matrix and all of Triton
	$(PYTEST)
	$(MAKE) test-matrix
	$(MAKE) test-triton TRITON_FLAGS=--all

test-matrix: $(INSTALLED) ## run the tests that touch transformers on each version in tests/matrix
	JOBS=$(JOBS) bash scripts/test_matrix.sh $(BIN)

test-triton: $(INSTALLED) ## compile the Triton kernels without a GPU; TRITON_FLAGS=--all: each GPU generation, old Triton
	bash scripts/test_triton.sh $(BIN) $(TRITON_FLAGS)

test-published: $(INSTALLED) ## compare the drop-in with the published code: make test-published PUBLISHED=FOLDER
	@test -n "$(PUBLISHED)" || { echo "Set PUBLISHED to the folder of a checkout of the published code."; exit 2; }
	$(PYTEST) tests/published --published "$(PUBLISHED)"

test-cuda-build: $(INSTALLED) ## compile the CUDA module with nvcc for sm_90a, look at it, and run its emulation
	OMP_NUM_THREADS=1 $(BIN)/pytest -s $(PYTEST_FLAGS) tests/kernels/test_cuda_build.py -k "sm_90a or emulated"

# Exit code 3: what could not run is listed as not available, and nothing failed.
sanitize: $(INSTALLED) ## watch the CUDA kernels: emulated by the compiler's sanitizers, on a GPU by compute-sanitizer
	bash scripts/sanitize_cuda.sh $(BIN)/python emulated gpu || test $$? -eq 3

support-table: $(INSTALLED) ## run the tests of the support table on each version, and write it into docs/models.md
	MATRIX_MARKS= MATRIX_TESTS="tests/mllm/test_families.py tests/mllm/test_front_door_families.py" $(MAKE) test-matrix
	$(BIN)/python scripts/support_table.py
	$(BIN)/python scripts/update_docs.py

sanitize-cpu: $(INSTALLED) ## run the grid and some fuzz on an instrumented build of the native CPU code
	bash scripts/sanitize_cpu.sh $(BIN)

gpu-report-kernels: ## on a GPU machine, offline: build, test and measure the decode step, results in $$OUT or benchmarks/results
	$(PYTHON) scripts/gpu_report.py kernels

gpu-report-generate: ## the same for whole answers
	$(PYTHON) scripts/gpu_report.py generate

lint: $(INSTALLED) ## check style, formatting and types
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: $(INSTALLED) ## apply the formatter and the safe fixes of the linter
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

dist: $(INSTALLED) ## build sdist and wheel, install the wheel elsewhere, and try it from an empty folder
	bash scripts/check_dist.sh $(BIN)/python

bench-hazard-world: $(INSTALLED) ## train and measure five seeds and the control world of Hazard World (hours)
	for seed in 0 1 2 3 4; do \
	  $(BIN)/python benchmarks/hazard_world.py seed $$seed --weights out/hazard_world/$$seed $(BENCH_FLAGS) || exit 1; \
	done
	$(BIN)/python benchmarks/hazard_world.py no-priors --weights out/hazard_world/no_priors $(BENCH_FLAGS)
	$(BIN)/python benchmarks/hazard_world.py summary

bench-judges: $(INSTALLED) ## measure the judges of Hazard World on the models that bench-hazard-world trained
	for seed in 0 1 2 3 4; do \
	  $(BIN)/python benchmarks/judges.py seed $$seed --weights out/hazard_world/$$seed \
	    --other out/hazard_world/$$(( (seed + 1) % 5 )) $(BENCH_FLAGS) || exit 1; \
	done
	$(BIN)/python benchmarks/judges.py summary

injection: $(INSTALLED) ## attack the judge of a real model with forged replies: MODEL=PATH_OR_ID
	@test -n "$(MODEL)" || { echo "set MODEL to a folder or a Hugging Face id, for instance MODEL=hazard-world"; exit 2; }
	$(BIN)/python benchmarks/injection.py --model $(MODEL) $(INJECTION_FLAGS)

clean: ## remove what builds and runs left behind, but not .venv
	rm -rf build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find safecode_kernels python tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## remove the environments too
	rm -rf $(VENV) .matrix
