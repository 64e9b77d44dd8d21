#!/usr/bin/env bash
# Runs the tests that touch transformers on every version in tests/matrix, in one torch environment: each version is
# installed into a folder of its own that PYTHONPATH puts in front of the environment's.
# usage: test_matrix.sh PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1

for pins in tests/matrix/*.txt; do
    version=$(basename "$pins" .txt)
    folder=.matrix/$version
    if ! cmp -s "$pins" "$folder/pins.txt"; then
        rm -rf "$folder"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" -r "$pins"
        cp "$pins" "$folder/pins.txt"
    fi
    export PYTHONPATH=$PWD/$folder
    found=$("$python" -c 'import transformers; print(transformers.__version__)')
    if [ "$found" != "$version" ]; then
        echo "test_matrix: wanted transformers $version, imported $found" >&2
        exit 1
    fi
    printf '\n--- transformers %s\n' "$version"
    OMP_NUM_THREADS=1 "$python" -m pytest -n "${JOBS:-2}" -m "not slow" tests/mllm tests/hazard_world
done
