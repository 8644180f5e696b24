"""Files import only downwards (house.md: the staircase), and importing the package is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import lord_tune

ROOT = Path(lord_tune.__file__).parent
# each row imports from rows above it only; files of one row may import each other if they are one folder
STAIRS = [
    ["errors", "declared", "linalg", "memory", "parallel", "protocols", "table_layout"],
    ["storage", "console", "data", "kept", "yaml_files", "python_values"],
    ["calibration", "quantizers"],
    ["factorizations"],
    ["plans"],
    ["layers"],
    ["sites"],
    ["allocation"],
    ["decomposition"],
    ["integrations"],
    ["adapters"],
    ["evaluation", "training", "exports"],
    ["cards"],
    ["options", "trl_keys"],
    ["config"],
    ["signatures", "keywords"],
    ["provenance", "resolve", "checkup"],
    ["planning", "correction", "merges", "chatting", "reporting", "inspecting", "recipe_files"],
    ["size_tables"],
    ["sweep_plot", "tables", "evaluation_tables", "comparison_plot"],
    ["plan_tables", "dry_run", "journey"],
    ["decomposing", "evaluating"],
    ["commands"],
    ["demo", "comparing"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(STAIRS) for name in names}
LONGEST = 400  # lines of a file whose docstring gives no reason
REASON = "Longer than 400 lines because "
LOOSE = 0.05  # of the annotated parameters, the share that may mention Any


def module_of(path: Path) -> str:
    return ".".join(["lord_tune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports_of(name: str) -> set[tuple[str, str | None]]:
    """(module, name in it or None) of all of the package that a file imports: at its top, in functions, for types."""
    found: set[tuple[str, str | None]] = set()
    package = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
    return {(module, what) for module, what in found if module.split(".")[0] == "lord_tune"}


def defining(module: str, what: str | None) -> str:
    """The file that a name comes from: a module of this name, what a package's `__init__` re-exports, or `module`."""
    if f"{module}.{what}" in FILES:
        return f"{module}.{what}"
    if module in PACKAGES:
        for origin, name in imports_of(module):
            if name == what:
                return defining(origin, name)
    return module


def graph() -> dict[str, set[str]]:
    """File -> files it imports. To import from a folder is to run its `__init__` too, for all that are not inside it.

    The package's own `__init__` is left out: what it offers is imported at the first use only.
    """
    edges: dict[str, set[str]] = {name: set() for name in FILES if name != "lord_tune"}
    for name in edges:
        for module, what in imports_of(name):
            target = defining(module, what)
            parts = target.split(".")
            folders = {".".join(parts[:depth]) for depth in range(2, len(parts))}
            outside = {folder for folder in folders if folder != name and not name.startswith(f"{folder}.")}
            edges[name] |= ({target} | outside) - {"lord_tune"}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some circle of the graph; empty if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(edges[name]):
            if found := visit(target, [*path, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def test_no_file_imports_itself_in_a_circle():
    assert circle(graph()) == []


def test_every_import_is_of_a_file_that_exists():
    assert {target for targets in graph().values() for target in targets} <= set(FILES)


def test_every_file_has_a_level():
    parts = {name.split(".")[1] for name in FILES if name != "lord_tune"}
    assert parts == set(LEVEL)


def test_imports_go_down():
    pairs = [(name, target) for name, targets in graph().items() for target in targets]
    parts = [(name, target, name.split(".")[1], target.split(".")[1]) for name, target in pairs]
    wrong = [f"{name} -> {target}" for name, target, a, b in parts if a != b and LEVEL[b] >= LEVEL[a]]
    assert wrong == []


def test_files_of_a_folder_do_not_import_through_its_init():
    wrong = [
        f"{name}: {what}"
        for name in FILES
        for module, what in imports_of(name)
        if module in PACKAGES - {"lord_tune"} and name.startswith(f"{module}.") and f"{module}.{what}" not in FILES
    ]
    assert wrong == []


def test_no_folder_exports_a_name_over_its_own_file():
    hidden = [f"{name}.{what}" for name in PACKAGES for _, what in imports_of(name) if f"{name}.{what}" in FILES]
    assert hidden == []


def test_long_files_give_a_reason():
    long = {name for name, path in FILES.items() if len(path.read_text().splitlines()) > LONGEST}
    reasoned = {name for name, tree in TREES.items() if REASON in " ".join((ast.get_docstring(tree) or "").split())}
    assert long == reasoned


def parameters() -> list[tuple[str, ast.expr]]:
    """file:function:parameter and its annotation, of all that have one."""
    functions = [
        (name, node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [
        (f"{name}:{function.name}:{parameter.arg}", parameter.annotation)
        for name, function in functions
        for parameter in ast.walk(function.args)
        if isinstance(parameter, ast.arg) and parameter.annotation is not None
    ]


def mentions_any(annotation: ast.expr) -> bool:
    text = [ast.unparse(annotation), *(n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant))]
    return any(re.search(r"\bAny\b", part) for part in text if isinstance(part, str))


def test_few_parameters_are_of_any_type():
    found = parameters()
    loose = [name for name, annotation in found if mentions_any(annotation)]
    assert len(loose) <= LOOSE * len(found), loose


def test_no_alias_of_any():
    aliases = [
        f"{name}: {ast.unparse(node)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and ast.unparse(node.value) in ("Any", "typing.Any", "'Any'")
    ]
    assert aliases == []


def test_numerics_do_not_import_models_or_commands():
    for folder in ("quantizers", "factorizations", "allocation"):
        for path in (ROOT / folder).glob("*.py"):
            assert "transformers" not in path.read_text().replace("transformers loads", ""), path


def test_only_the_command_line_speaks_of_flags():
    """A caller from Python or YAML reads what lower files say; cli.py turns a `key` in it into a flag."""
    upper = {"cli", "config", "commands", "decomposing", "tables", "demo", "cards", "checkup", "provenance"}
    upper |= {"recipe_files"}  # the command that runs a copy
    flag, found = re.compile(r"(?<!pip install )(?<!without )--[a-z]"), []
    for name, tree in TREES.items():
        if name == "lord_tune" or name.split(".")[1] in upper | {"plans"}:  # plans: a command that writes one
            continue
        if name == "lord_tune.integrations.hub":  # of another program: hf upload
            continue
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        found += [f"{name}: {text}" for text in texts if flag.search(text) and text not in docstrings]
    assert found == []


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


def test_only_training_imports_trl_and_only_a_curve_matplotlib(llama_dir, rows_file, tmp_path):
    code = f"""
import sys, lord_tune
model, text, out = {str(llama_dir)!r}, {str(rows_file)!r}, {str(tmp_path)!r}
lord_tune.plan(model, method="svd", rank=4, json=out + "/plan.json")
lord_tune.decompose(model, out + "/lord", method="svd", rank=4, backbone="nf4")
lord_tune.inspect(out + "/lord")
lord_tune.evaluate(out + "/lord", [text], context_length=32, max_tokens=64)
lord_tune.export(out + "/lord", out + "/dense", "dense")
lord_tune.doctor(json=out + "/doctor.json")
print("loaded:", [name for name in ("trl", "matplotlib") if name in sys.modules])
"""
    assert run(code).endswith("loaded: []")


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
