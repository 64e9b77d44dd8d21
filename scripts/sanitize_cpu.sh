#!/usr/bin/env bash
# Builds the native CPU code with AddressSanitizer and UndefinedBehaviorSanitizer and runs the grid and some fuzz on it.
#   bash scripts/sanitize_cpu.sh .venv/bin
# The instrumented module goes into a copy of the package of its own, which PYTHONPATH puts before the installed one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$(realpath "$1")
build=build/sanitize
overlay=$PWD/$build/overlay
seeds=$(head -n 3 tests/data/fuzz_seeds.txt | paste -sd '|' | sed 's/|/ or /g')

cmake -S . -B "$build/native" -G Ninja -DSAFECODE_SANITIZE=address,undefined \
    -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$bin/python" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$overlay/safecode_kernels" > /dev/null
rm -rf "$overlay"
mkdir -p "$overlay"
cmake --build "$build/native" > /dev/null
cp -r safecode_kernels/*.py safecode_kernels/backends "$overlay/safecode_kernels/"

export PYTHONPATH=$overlay OMP_NUM_THREADS=1 SAFECODE_REQUIRE=native_cpu
# Python itself and torch are not instrumented: their allocations at exit are no leaks of ours.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
run() { LD_PRELOAD="$preload" "$bin/python" -P "$@"; }  # -P: this folder's package must not come first
run -c "import safecode_kernels._native as n; assert n.__file__.startswith('$overlay'), n.__file__; print(n.__file__)"
run -m pytest -q -p no:cacheprovider tests/kernels/test_grid.py -k "native_cpu and not 151936 and not 152065 and not 32000"
run -m pytest -q -p no:cacheprovider tests/kernels/test_fuzz.py -k "test_random_calls and ($seeds)"
