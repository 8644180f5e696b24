#!/usr/bin/env bash
# Build the sdist and the wheel, install the wheel in an environment of its own, and try it: bash scripts/check_package.sh
# The new environment reads the libraries of the active one (torch is large), but not its lord_tune.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH
checkout=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

python - "$work"/dist/* <<'END'
import sys, tarfile, zipfile
from pathlib import Path
recipes = [path.as_posix() for path in Path("recipes").rglob("*") if path.is_file()]
for path in sys.argv[1:]:
    if path.endswith(".whl"):
        names = zipfile.ZipFile(path).namelist()
    else:
        names = [member.name for member in tarfile.open(path) if member.isfile()]
    for wanted in ("lord_tune/py.typed", "LICENSE", "lord_tune/quantizers/e8.py", "lord_tune/reporting/page.html"):
        if not any(name.endswith(wanted) for name in names):
            sys.exit(f"error: {wanted} is not in {path}")
    place = "lord_tune/_recipes/" if path.endswith(".whl") else "/recipes/"
    held = [name for name in names if place in name]
    if len(held) != len(recipes):
        sys.exit(f"error: {path} holds {len(held)} files of {len(recipes)} in recipes/")
END

python -m venv --without-pip "$work/venv"
python -m pip --python "$work/venv/bin/python" install -q --no-deps --no-index "$work"/dist/*.whl
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# after pip, which would see them
python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' >"$site/libraries.pth"
cd "$work"
version=$(venv/bin/lord-tune version)
[[ "$(ls dist)" == *"-$version"* ]] || { echo "error: lord-tune version says $version, the archives are $(ls dist)" >&2; exit 1; }
venv/bin/lord-tune --help >/dev/null
venv/bin/python - <<'END'
import lord_tune
assert lord_tune.__file__.startswith(__import__("sys").prefix), lord_tune.__file__
lord_tune.decompose
END
venv/bin/lord-tune recipes copy smollm2_135m/decompose/max_60mb copied.yaml >/dev/null
cmp copied.yaml "$checkout/recipes/smollm2_135m/decompose/max_60mb.yaml"
echo "the package is complete: $(cd dist && ls | tr '\n' ' ')"
