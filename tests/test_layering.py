"""Files import only downwards (house.md: the staircase), and importing the package is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lord_tune

ROOT = Path(lord_tune.__file__).parent
# each row imports from rows above it only; files of one row may import each other if they are one folder
STAIRS = [
    ["errors", "declared", "linalg", "memory", "parallel"],
    ["storage", "console"],
    ["data"],
    ["calibration", "quantizers"],
    ["factorizations"],
    ["plans"],
    ["layers"],
    ["sites"],
    ["allocation"],
    ["decomposition"],
    ["integrations"],
    ["adapters"],
    ["evaluation", "training", "exports", "cards"],
    ["options"],
    ["config"],
    ["signatures", "keywords"],
    ["provenance", "resolve", "tables", "checkup"],
    ["commands"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(STAIRS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
LONGEST = 400
REASON = "Longer than 400 lines because"


def name_of(path: Path) -> str:
    """lord_tune.a.b, also for lord_tune/a/b/__init__.py."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES} | {"lord_tune"}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: at its top, inside functions, under TYPE_CHECKING.

    Importing a name that a package's `__init__` re-exports counts as importing that `__init__`.
    """
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{target}.{a.name}" if f"{target}.{a.name}" in MODULES else target for a in node.names}
    return (found & MODULES) - {"lord_tune"}


GRAPH = {name_of(path): imports_of(path) for path in FILES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or nothing."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            found = follow(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := follow(name, []))), [])


def part_of(module: str) -> str:
    return module.split(".")[1]


def test_every_file_has_a_level():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts == set(LEVEL)


def test_imports_go_down():
    wrong = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if part_of(other) != part_of(module) and LEVEL[part_of(other)] >= LEVEL[part_of(module)]
    ]
    assert wrong == []


def test_no_file_is_part_of_a_circle():
    assert circle(GRAPH) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_long_file_says_why(path: Path):
    text = path.read_text()
    documented = ast.get_docstring(ast.parse(text)) or ""
    assert text.count("\n") <= LONGEST or REASON in re.sub(r"\s+", " ", documented)


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


def test_the_generated_files_are_up_to_date():
    """options.py is written because --help must not import torch, signatures.py because a type checker runs nothing."""
    script = ROOT.parent / "scripts" / "make_options.py"
    checked = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
