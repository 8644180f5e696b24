"""The notebooks run from top to bottom on a tiny model, and carry no outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "recipes/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL: dict[str, Any] = {
    "FILES": 10,
    "RANK": 4,
    "METHODS": ["loftq", "rounding"],
    "BITS_PER_WEIGHT": 12.0,  # rank 8 is much beside layers as small as these
    "CALIBRATION_TOKENS": 512,
    "HELD_OUT_TOKENS": 256,
    "WINDOW": 64,
    "STEPS": 2,
    "TRAINING_LENGTH": 64,
}


def parameters_of(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The first cell of code: assignments alone."""
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, llama_dir, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cell = parameters_of(notebook)
    names = re.findall(r"^([A-Z_]+) = ", cell.source, re.MULTILINE)
    assert names[:2] == ["MODEL", "FOLDER"] and set(names[2:]) <= set(SMALL)
    values = {"MODEL": str(llama_dir), "FOLDER": "written"} | {name: SMALL[name] for name in names[2:]}
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output.data for output in shown) == (2 if path.stem == "compare_methods" else 1)
    last = printed(notebook).splitlines()
    if path.stem == "decompose_and_train":
        assert [line.split()[0] for line in last[-3:]] == ["original", "decomposed", "trained"]
        assert "def read_lines(path):" in printed(notebook) and (tmp_path / "written/merged/config.json").is_file()
    else:
        assert [line.split()[0] for line in last[-3:]] == ["original", "loftq", "rounding"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(NOTEBOOKS) == 2 and "MINUTES" not in path.read_text()
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
        assert max(map(len, cell.source.splitlines())) <= 120
