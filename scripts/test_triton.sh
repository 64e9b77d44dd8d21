#!/usr/bin/env bash
# Compiles the Triton kernels without a GPU and checks registers, spills and loads: for sm_90 and bfloat16 with the
# installed Triton. --all: for sm_80, sm_90, sm_100 and every dtype, also with the oldest Triton that pyproject.toml allows,
# whose interpreter then runs the tests too. That one is in a folder of its own that PYTHONPATH puts in front.
# usage: test_triton.sh FOLDER_OF_PYTHON_AND_PYTEST [--all]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
binaries=$1
oldest=3.6.0

compile() {
    printf '\n--- triton %s, compiled\n' "$("$binaries/python" -c 'import triton; print(triton.__version__)')"
    local cache
    cache=$(mktemp -d)
    # Always anew: what an earlier run has left in a cache proves nothing.
    TRITON_CACHE_DIR=$cache TRITON_ALWAYS_COMPILE=1 OMP_NUM_THREADS=1 "$binaries/python" scripts/compile_triton.py "$@" ||
        { rm -rf "$cache"; return 1; }
    rm -rf "$cache"
}

if [ "${2:-}" != --all ]; then
    compile --arch 90 --dtype bfloat16
    exit
fi

compile --arch 80 --arch 90 --arch 100
folder=.matrix/triton-$oldest
if [ ! -d "$folder" ]; then
    # Its interpreter was written before numpy 2.4 made arrays of one element refuse to become scalars.
    "$binaries/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.part" \
        "triton==$oldest" "numpy<2.4"
    mv "$folder.part" "$folder"
fi
export PYTHONPATH=$PWD/$folder
compile --arch 80 --arch 90 --arch 100
printf '\n--- triton %s, interpreted\n' "$oldest"
OMP_NUM_THREADS=1 "$binaries/pytest" tests/kernels/test_triton_interpreted.py
