#!/usr/bin/env bash
# The tests on real models, and the cases of large grids that not every run takes: bash scripts/test_slow.sh [pytest options]
source "$(dirname "$0")/environment.sh" dev
python -m pytest -m slow "$@"
