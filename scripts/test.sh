#!/usr/bin/env bash
# Lint, types, the package and tests in a virtual environment of their own: bash scripts/test.sh [pytest options]
source "$(dirname "$0")/environment.sh" dev
export OMP_NUM_THREADS=1  # tiny matrices: more threads only wait for each other
ruff check .
ruff format --check .
mypy
bash scripts/check_package.sh
python -m pytest -m "not slow" -n 2 --dist loadfile "$@"  # a file is one worker's: fixtures are shared
