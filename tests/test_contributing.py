"""The worked examples of CONTRIBUTING.md do what they say: each is entered where it says, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import test_factorizations
import test_quantizers
import torch
from contracts import FactorizationRow
from tiny import code_document
from torch import Tensor

import lord_tune
from lord_tune.allocation import ALLOCATORS, Choices
from lord_tune.calibration.moments import Moments
from lord_tune.declared import option, options_of
from lord_tune.exports.base import Job
from lord_tune.exports.dense import DenseExport
from lord_tune.exports.run import EXPORTS, export_model
from lord_tune.factorizations import METHODS, Core, Projection
from lord_tune.linalg import principal_axes
from lord_tune.plans import LayerChoice, Plan
from lord_tune.quantizers import QUANTIZERS
from lord_tune.quantizers.grouped import Grouped

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
NEEDED = (Any, Choices, ClassVar, Core, DenseExport, Grouped, Job, Mapping, Moments, Projection, Tensor)
SHORT: dict[str, Any] = {"context_length": 64, "calibration_tokens": 512}


def example(marker: str) -> Any:
    """The class that the example below a marker defines."""
    code = re.search(rf"<!-- {marker} -->.*?```python\n(.*?)```", TEXT, flags=re.S)
    assert code is not None, marker
    functions = (dataclass, option, principal_axes, replace)
    names: dict[str, Any] = {getattr(thing, "__name__", str(thing)): thing for thing in (*NEEDED, *functions)}
    names |= {"Any": Any, "ClassVar": ClassVar, "torch": torch, "__name__": __name__}
    before = set(names)
    exec(compile(code[1], f"CONTRIBUTING.md: {marker}", "exec"), names)
    return next(value for name, value in names.items() if name not in before and isinstance(value, type))


def test_the_method_passes_the_laws_and_decomposes(llama_dir, rows_file, tmp_path, monkeypatch):
    method = example("add-method")
    reason = "a compromise between two optima reaches neither"
    row = FactorizationRow(method(), excused={"weight_optimum": reason, "output_optimum": reason})
    test_factorizations.test_shapes(row, (40, 16))
    test_factorizations.test_full_rank_recovers_the_layer(row, (16, 40))
    test_factorizations.test_error_falls_with_rank(row, (24, 24))
    test_factorizations.test_arguments_are_not_changed(row)
    monkeypatch.setitem(METHODS, method.name, method)
    assert [item.key for item in options_of(method)] == ["temper"]
    lord_tune.plan(str(llama_dir), save=str(tmp_path / "svd.json"), json=str(tmp_path / "e.json"), method="svd", rank=8)
    names = Plan.read(tmp_path / "svd.json").layers
    errors = {}
    for temper in (0.0, 1.0):
        plan = tmp_path / f"plan-{temper}.json"
        Plan(dict.fromkeys(names, LayerChoice(method.name, 8, {"temper": temper}))).save(plan)
        report = lord_tune.decompose(
            str(llama_dir), str(tmp_path / f"out-{temper}"), plan=str(plan), calibration=[str(rows_file)], **SHORT
        )
        errors[temper] = sum(entry["error_calibrated"] for entry in report["layers"].values())
    assert errors[1.0] < errors[0.0]


def test_the_format_passes_the_laws(monkeypatch, tmp_path):
    form = example("add-format")
    monkeypatch.setitem(QUANTIZERS, form.name, form)
    for shape in ((40, 16), (33, 17)):
        test_quantizers.test_empty_has_the_shapes_and_dtypes_of_quantize(form(), shape)
        test_quantizers.test_stored_tensors_survive_safetensors(form(), shape, tmp_path)
        test_quantizers.test_row_slices_decode_to_the_rows(form(), shape)
    test_quantizers.test_constant_and_zero_rows_are_finite(form())
    assert LayerChoice("svd", 4, {}, "ternary", {"group_size": 32}).quantizer() == form(32)


def entered(folder: Path, marker: str, file: str, entry: tuple[str, str]) -> None:
    """Enter an example in a copy of the package, as the page says: a file, an import and a place in the dict."""
    code = re.search(rf"<!-- {marker} -->.*?```python\n(.*?)```", TEXT, flags=re.S)[1]
    package = folder / "lord_tune" / Path(file).parent
    uses = "\n".join(f"from lord_tune.{where} import {what}" for what, where in USED.items() if what in code)
    head = "from dataclasses import dataclass\nfrom typing import ClassVar\n\nimport torch\nfrom torch import Tensor\n"
    (package / Path(file).name).write_text(f"from __future__ import annotations\n\n{head}\n{uses}\n\n\n{code}")
    name = re.search(r"class (\w+)", code)[1]
    before, after = entry  # in the dict
    text = (package / "__init__.py").read_text()
    assert text.count(before) == 1
    line = f"from .{Path(file).stem} import {name}\n\n"
    text = text.replace(before, after)
    (package / "__init__.py").write_text(re.sub(r"^(METHODS|QUANTIZERS):", line + r"\1:", text, count=1, flags=re.M))


USED = {
    "Grouped": "quantizers.grouped",
    "option": "declared",
    "Core": "factorizations.base",
    "Projection": "factorizations.base",
    "Moments": "calibration.moments",
    "principal_axes": "linalg",
}


def test_their_options_are_flags_once_the_script_has_run(llama_dir, rows_file, tmp_path):
    """The two examples, entered in a copy: in the help, and taken by a run."""
    root = Path(lord_tune.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("lord_tune", "scripts"):
        shutil.copytree(root.parent / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(root.parent / "pyproject.toml", tmp_path)
    entered(tmp_path, "add-format", "quantizers/ternary.py", ("W8A16),\n    )", "W8A16, Ternary),\n    )"))
    entered(
        tmp_path,
        "add-method",
        "factorizations/tempered.py",
        ('"tucker": Tucker,', '"tucker": Tucker, "tempered": Tempered,'),
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    run("scripts/make_options.py")
    shown = run("-m", "lord_tune", "decompose", "--help")
    assert "ternary: weights per scale" in shown and "--temper <float> tempered: power" in shown
    given = ["--backbone", "ternary", "--group-size", "32", "--method", "tempered", "--temper", "0.25", "--rank", "4"]
    short = ["--calibration", str(rows_file), "--context-length", "64", "--calibration-tokens", "256"]
    run("-m", "lord_tune", "decompose", str(llama_dir), "out", *given, *short)
    layers = json.loads((tmp_path / "out" / "plan.json").read_text())["layers"].values()
    assert {choice["method_options"]["temper"] for choice in layers} == {0.25}
    assert {choice["backbone_options"]["group_size"] for choice in layers} == {32}


def test_the_allocator_meets_its_budget(monkeypatch):
    allocator = example("add-allocator")
    monkeypatch.setitem(ALLOCATORS, allocator.name, allocator)
    layers = {f"layer{i}": Choices(torch.tensor([8.0, 20.0 + i, 64.0 + i]), 64.0 + i) for i in range(6)}
    for share in (0.4, 0.7, 0.9):
        budget = share * sum(layer.dense for layer in layers.values())
        chosen = allocator().allocate(layers, budget)
        assert sum(float(layers[n].costs[i]) for n, i in chosen.items()) <= budget and 2 in chosen.values()


def test_the_export_is_written_and_compared(llama_dir, tmp_path, monkeypatch):
    export = example("add-export")
    monkeypatch.setitem(EXPORTS, export.name, export())
    lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), method="svd", rank=8)
    model, tokenizer = lord_tune.load(str(tmp_path / "out"))
    (tmp_path / "half").mkdir()
    comparison = export_model(model, tokenizer, tmp_path / "half", "half", text=code_document(0))
    assert 0 < comparison.kl < 1e-2
    with pytest.raises(lord_tune.errors.ExportMismatch):
        model, tokenizer = lord_tune.load(str(tmp_path / "out"))
        export_model(model, tokenizer, tmp_path / "half", "half", threshold=0.0)
