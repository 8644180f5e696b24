"""`lord-tune doctor` reports this machine, and says what is missing, wrong or slow."""

from __future__ import annotations

import json

import pytest
import torch
from packaging.requirements import Requirement

import lord_tune
from lord_tune import checkup
from lord_tune.cli import main

REQUIREMENTS = [Requirement(text) for text in ("torch>=2.9", "transformers>=5.0,<6", "safetensors>=0.6")]


@pytest.fixture
def sound(monkeypatch):
    """The same supported ranges wherever the tests run."""
    monkeypatch.setattr(checkup, "needed", lambda: list(REQUIREMENTS))
    return monkeypatch


def test_this_machine_is_ready(sound, capfd, tmp_path):
    report = lord_tune.doctor(json=str(tmp_path / "report.json"))
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == [] and report["quantizer_registered"] and report["bitsandbytes_works_on"]
    assert report["libraries"]["torch"] == {"version": torch.__version__, "supported": ">=2.9"}
    first = report["devices"][0]
    assert first["device"] == "cpu" and first["name"] and first["cores"] > 0 and first["memory_bytes"] > 2**28
    assert capfd.readouterr().out == ""
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    shown = capfd.readouterr().out
    assert stop.value.code == 0
    for part in ("torch", ">=2.9", "cpu", "OMP_NUM_THREADS", "trackio", "factored checkpoints: yes"):
        assert part in shown, part


@pytest.mark.parametrize(
    ("requirement", "named"),
    [
        ("not-there>=1", "not-there is missing; pip install 'not-there>=1'"),
        ("torch>=99", f"torch {torch.__version__} is outside the supported range >=99; pip install 'torch>=99'"),
    ],
)
def test_a_wrong_library_is_named(sound, capfd, requirement, named):
    sound.setattr(checkup, "needed", lambda: [*REQUIREMENTS, Requirement(requirement)])
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    printed = capfd.readouterr()
    assert stop.value.code == 1 and named in printed.err and "safetensors" in printed.out


def test_broken_parts_do_not_hide_each_other(sound):
    def broken() -> None:
        raise ImportError("libcudart.so is missing")

    sound.setattr(checkup, "check_kernels", broken)
    sound.setattr(checkup, "check_quantizer", broken)
    report = checkup.examine()
    assert len(report["problems"]) == 2 and all("libcudart.so" in problem for problem in report["problems"])
    assert not report["quantizer_registered"] and report["bitsandbytes_works_on"] is None and report["threads"]


def test_too_many_threads_are_a_hint(sound):
    sound.setattr(checkup, "cores", lambda: 2)
    sound.setattr(torch, "get_num_threads", lambda: 16)
    assert any("OMP_NUM_THREADS=2" in hint for hint in checkup.examine()["hints"])
    sound.setattr(torch, "get_num_threads", lambda: 2)
    assert checkup.examine()["hints"] == []


def test_kernels_that_decode_garbage_are_found(sound):
    sound.setattr(checkup, "_LARGEST_ERROR", 0.01)  # NF4 cannot be that good
    with pytest.raises(lord_tune.LordError, match="relative error"):
        checkup.check_kernels()


def test_the_supported_ranges_are_those_of_the_installed_package():
    names = {item.name for item in checkup.needed()}
    assert names == set() or {"torch", "transformers", "peft", "trl"} <= names and "ruff" not in names
