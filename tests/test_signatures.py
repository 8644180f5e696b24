"""The verbs show their options to Python: in the signature, in the help, to a type checker."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from inspect import Parameter
from pathlib import Path

import pytest

import lord_tune
from lord_tune.config import RECORDS

USER = """import lord_tune

lord_tune.decompose("demo", "out", rank=8, backbone="nf4", calibration=["text.jsonl"])
lord_tune.plan("demo", rank=8, json="plan.json")
lord_tune.export("trained", "dense", "dense", dtype="float16")
lord_tune.train(model_name_or_path="out", output_dir="trained", dataset_name="rows.jsonl", max_steps=4)
"""


@pytest.mark.parametrize("verb", RECORDS)
def test_the_signature_lists_every_option(verb):
    record = RECORDS[verb]
    parameters = inspect.signature(getattr(lord_tune, verb)).parameters
    named = {name: item for name, item in parameters.items() if item.kind is not Parameter.VAR_KEYWORD}
    fields = {field.alias or name: field for name, field in record.model_fields.items()}
    assert set(named) == set(fields)
    for name, field in fields.items():
        if field.is_required():
            assert named[name].default is Parameter.empty
        else:
            assert named[name].default == field.get_default(call_default_factory=True)
    by_position = [name for name, item in named.items() if item.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert tuple(by_position) == record.positional
    assert ("trl_options" in parameters) == (verb == "train")


@pytest.mark.parametrize("verb", RECORDS)
def test_the_help_describes_every_option(verb):
    shown = " ".join(inspect.getdoc(getattr(lord_tune, verb)).split())
    for name, field in RECORDS[verb].model_fields.items():
        assert f"{field.alias or name}" in shown and " ".join(field.description.split()) in shown, name


def test_a_type_checker_knows_the_options(tmp_path):
    """mypy on users' files."""
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER.replace('rank=8, backbone="nf4"', 'rnak=8, backbone="nf5"'))
    root = Path(lord_tune.__file__).parent
    assert (root / "py.typed").is_file()
    settings = ["--config-file", str(root.parent / "pyproject.toml"), "--cache-dir", str(root.parent / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings, "right.py", "wrong.py"]  # its cache is warm in scripts/test.sh
    environment = {**os.environ, "MYPYPATH": str(root.parent)}  # an editable install is invisible to mypy
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "right.py" not in done.stdout, done.stdout
    assert all(f"wrong.py:3: error: {what}" in done.stdout for what in ("Unexpected keyword", "Argument")), done.stdout
    assert "rnak" in done.stdout and "backbone" in done.stdout, done.stdout


def test_names_of_the_package_are_complete():
    assert set(lord_tune.__all__) <= set(dir(lord_tune))
    assert all(getattr(lord_tune, name) is not None for name in lord_tune.__all__)
    assert issubclass(lord_tune.UsageError, lord_tune.LordError)
