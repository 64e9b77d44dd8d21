#!/usr/bin/env bash
# Runs the tests that touch transformers on every version in tests/matrix, in one torch environment: each version is
# installed into a folder of its own that PYTHONPATH puts in front of the environment's.
# usage: test_matrix.sh FOLDER_OF_PYTHON_AND_PYTEST
# MATRIX_TESTS: run these files or folders instead of all. MATRIX_MARKS: which of their tests, as for pytest -m.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
binaries=$1

for pins in tests/matrix/*.txt; do
    version=$(basename "$pins" .txt)
    folder=.matrix/$version
    if ! cmp -s "$pins" "$folder/pins.txt"; then
        rm -rf "$folder"
        "$binaries/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" -r "$pins"
        cp "$pins" "$folder/pins.txt"
    fi
    in_front=$PWD/$folder
    found=$(PYTHONPATH=$in_front "$binaries/python" -c 'import transformers; print(transformers.__version__)')
    if [ "$found" != "$version" ]; then
        echo "test_matrix: wanted transformers $version, imported $found" >&2
        exit 1
    fi
    printf '\n--- transformers %s\n' "$version"
    # scripts/support_table.py reads what the tests of the support table came to.
    # shellcheck disable=SC2086
    PYTHONPATH=$in_front OMP_NUM_THREADS=1 "$binaries/pytest" -n "${JOBS:-2}" -m "${MATRIX_MARKS-not slow}" \
        --junitxml ".matrix/$version.xml" ${MATRIX_TESTS:-tests/mllm tests/hazard_world}
done
