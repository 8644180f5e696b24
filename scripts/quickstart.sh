#!/usr/bin/env bash
# The whole story on SmolLM2-135M, from a bare Python 3.11: bash scripts/quickstart.sh [options of lord-tune quickstart]
source "$(dirname "$0")/environment.sh" demo
exec lord-tune quickstart "$@"
