#!/usr/bin/env bash
# Builds the sdist, the wheel from that sdist, installs the wheel into a clean environment and tries it from an empty
# folder. The clean environment borrows the dependencies (torch above all) from the given one instead of installing them again.
# usage: check_dist.sh PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/$1
smoke_test=$PWD/scripts/smoke_test.py

rm -rf dist
"$python" -m build --outdir dist .   # without --sdist or --wheel: the wheel is built from the sdist

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
site_packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'
# A plain path in a .pth file adds the folder but does not run the .pth files in it, so the editable install stays out.
"$python" -c "$site_packages" > "$("$work/venv/bin/python" -c "$site_packages")/borrowed.pth"

mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" "$smoke_test"
