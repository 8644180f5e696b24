"""Files import only downwards (house.md: the staircase), and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lord_tune

ROOT = Path(lord_tune.__file__).parent
# each row imports from rows above it only; files of one row may import each other if they are one folder
STAIRS = [
    ["errors", "linalg", "memory", "parallel"],
    ["storage", "console"],
    ["calibration", "quantizers"],
    ["factorizations"],
    ["layer_plan"],
    ["layers"],
    ["allocation"],
    ["decomposition"],
    ["integrations"],
    ["evaluation", "training", "exporting", "cards"],
    ["config"],
    ["tables"],
    ["commands"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(STAIRS) for name in names}


def imported(path: Path) -> set[str]:
    """Names of the package's top-level parts that a file imports."""
    depth = len(path.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lord_tune."):
            found.add(node.module.split(".")[1])
    return found & set(LEVEL)


def test_every_file_has_a_level():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert parts - {"__init__"} == set(LEVEL)


def test_imports_go_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        wrong += [f"{path.name} -> {name}" for name in imported(path) if name != part and LEVEL[name] >= LEVEL[part]]
    assert wrong == []


def test_numerics_do_not_import_models_or_commands():
    for folder in ("quantizers", "factorizations", "allocation"):
        for path in (ROOT / folder).glob("*.py"):
            assert "transformers" not in path.read_text().replace("transformers loads", ""), path


def test_bitsandbytes_is_imported_in_one_file():
    files = [
        p.name
        for p in ROOT.rglob("*.py")
        if "import bitsandbytes" in p.read_text() or "from bitsandbytes" in p.read_text()
    ]
    assert files == ["nf4.py"]


def test_no_pickles():
    for path in ROOT.rglob("*.py"):
        assert "pickle" not in path.read_text() and "torch.load(" not in path.read_text(), path


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert run("import sys, lord_tune; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom lord_tune.cli import main\n"
        "try: main(['decompose', '--help'])\nexcept SystemExit: pass\n"
        "print('loaded:', 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(code).endswith("loaded: False False")


def test_the_quantizer_is_registered_in_either_order_of_imports():
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('lord' in m)"
    assert run(f"import lord_tune; {check}") == "True"
    assert run(f"import transformers.quantizers.auto; import lord_tune; {check}") == "True"
