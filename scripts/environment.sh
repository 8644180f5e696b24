# Sourced by the other scripts: makes ./.venv with the project in it (extras as "$1") and activates it.
# torch is installed first and by version, so that pip takes the build this machine offers for exactly that version
# (a CPU build where there is one) instead of the newest one with gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, found $("$python" --version); set PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
. .venv/bin/activate
export PIP_DISABLE_PIP_VERSION_CHECK=1
python -c 'import torch' 2>/dev/null || { echo "installing torch 2.13.0 ..."; python -m pip install -q torch==2.13.0; }
echo "installing lord_tune[$1] ..."
python -m pip install -q -e ".[$1]"
