"""scripts/check_device.py: every path of it works here, and a path that does not is told."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[1] / "scripts" / "check_device.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(_SCRIPT))


def test_every_path_is_ok_on_this_machine(script, tmp_path, capsys):
    code = script["main"](["--json", str(tmp_path / "device.json")])
    content = json.loads((tmp_path / "device.json").read_text())
    assert [entry for entry in content["paths"] if not entry["ok"]] == [] and code == 0
    assert len(content["paths"]) == len(capsys.readouterr().out.splitlines()) - 2
    assert all(entry["seconds"] > 0 and entry["peak_bytes"] > 0 for entry in content["paths"])
    kinds = {"format", "decompose", "adapter", "train", "evaluate", "export"}
    assert {entry["path"].split()[0] for entry in content["paths"]} == kinds


def test_a_path_that_fails_is_told_and_the_others_run(script, monkeypatch, capsys):
    from lord_tune.quantizers import Int4

    monkeypatch.setattr(Int4, "rounded", lambda self, values: 1 / 0)
    assert script["main"](["--only", "format int"]) == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said and said.endswith("3 of 4 paths ok; failed: format int4\n")


def test_an_odd_size_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script["main"](["--size", "100"])
    assert "got --size 100, expected a multiple of 64" in capsys.readouterr().err
