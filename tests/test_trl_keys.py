"""The keys of trl in the help of `train` are those of the installed trl, with the defaults that a run gets."""

from __future__ import annotations

import dataclasses
import inspect
import re
import resource
import subprocess
import sys

import pytest
from trl import SFTConfig

import lord_tune
from lord_tune.cli import main
from lord_tune.training import trainer_arguments
from lord_tune.training.arguments import LEARNING_RATES
from lord_tune.trl_keys import HEADING, TRL_KEYS


def test_the_defaults_are_those_of_a_run():
    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    got = trainer_arguments({"output_dir": "out"}, "factors", True, [])
    for name, key in TRL_KEYS.items():
        assert name in fields, name
        if key.kind is not str and key.kind is not bool:
            assert key.kind.__name__ in str(fields[name].type), name
        if key.kind is bool:
            assert "bool" in str(fields[name].type), name
        value = getattr(getattr(got, name), "value", getattr(got, name))
        if not isinstance(key.default, str) or key.default == value:
            assert key.default == value, name
    words = TRL_KEYS["learning_rate"].default
    assert {float(rate) for rate in re.findall(r"\de-\d", words)} == set(LEARNING_RATES.values())
    assert got.completion_only_loss is None and got.save_total_limit is None  # trl: true where there are completions


def test_help_shows_them_below_a_heading_of_their_own(capfd):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capfd.readouterr().out
    assert shown.index("\nCommon:\n") < shown.index(f"\n{HEADING}:\n") < shown.index("\nData:\n")
    below = shown[shown.index(f"\n{HEADING}:\n") :].split("\n\n")[0]
    assert all(f"\n  --{name} " in below for name in TRL_KEYS)
    assert "[default: 1024]" in below
    told = inspect.getdoc(lord_tune.train)
    assert all(f"\n    {name}" in told for name in TRL_KEYS)


def test_they_are_taken_as_before(monkeypatch):
    got = []
    monkeypatch.setattr(lord_tune, "train", lambda **values: got.append(values), raising=False)
    words = ["--learning_rate", "1e-3", "--packing", "--report_to", "none", "tensorboard", "--bf16=false"]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *words])
    assert stop.value.code == 0
    assert got[0]["learning_rate"] == "1e-3" and got[0]["packing"] == "true" and got[0]["bf16"] == "false"
    assert got[0]["report_to"] == ["none", "tensorboard"]


def test_help_is_quick_and_imports_no_trl():
    code = (
        "import sys\nfrom lord_tune.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print('loaded:', [name for name in ('torch', 'trl', 'transformers') if name in sys.modules])"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start  # seconds of a core
    assert done.stdout.strip().endswith("loaded: []") and used < 2
