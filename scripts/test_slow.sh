#!/usr/bin/env bash
# The tests on real models (minutes): bash scripts/test_slow.sh [pytest options]
source "$(dirname "$0")/environment.sh" dev
python -m pytest -m slow "$@"
