"""`plan --gpu-memory`: what is foreseen from shapes is what the decomposed model takes."""

from __future__ import annotations

import json

import pytest

import lord_tune
from lord_tune.errors import UsageError
from lord_tune.exports.run import EXPORTS
from lord_tune.journey import CONTEXT_BYTES
from lord_tune.training import TrainOptions, predict_memory, trainer_arguments

SAME = {"backbone": "nf4", "rank": 8, "method": "svd"}


@pytest.fixture(scope="module")
def decomposed(aligned_llama_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("journey") / "out"
    return out, lord_tune.decompose(aligned_llama_dir, out, **SAME)


@pytest.fixture(scope="module")
def foreseen(aligned_llama_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    lord_tune.plan(aligned_llama_dir, **SAME, gpu_memory="24GB", json=str(file))
    return json.loads(file.read_text())["journey"]


def test_a_step_is_foreseen_as_from_the_checkpoint(decomposed, foreseen):
    given = {"output_dir": "o", "gradient_checkpointing": True, "per_device_train_batch_size": 8}
    arguments = trainer_arguments(given, "factors", True, [])
    arguments.bf16 = True
    real = predict_memory(str(decomposed[0]), TrainOptions(str(decomposed[0]), "d"), arguments, accelerator=True)
    step = foreseen["steps"]["train"]
    assert step["memory"] == real.peak and step["fits"] and "8 sequences" in step["told"]


def test_exports_take_what_is_foreseen(decomposed, foreseen, tmp_path):
    steps, report = foreseen["steps"], decomposed[1]
    assert set(steps) == {"decompose", "train", *(f"export {form}" for form in EXPORTS)}
    assert steps["export factored"]["disk"] == report["totals"]["model_bytes"]
    for form in ("dense", "peft"):
        written = lord_tune.export(decomposed[0], tmp_path / form, form)["bytes"]
        assert 0.8 * written < steps[f"export {form}"]["disk"] <= written  # names and shapes are in a file too
    for form in ("vllm", "compressed-tensors"):
        assert steps[f"export {form}"]["fits"] is None and "has backbone nf4" in steps[f"export {form}"]["told"]
    assert foreseen["fits"]


def test_a_small_gpu_gets_fewer_sequences_or_a_no(aligned_llama_dir, foreseen, tmp_path):
    file, found = tmp_path / "plan.json", {}
    for name, size in {"less": CONTEXT_BYTES + foreseen["steps"]["train"]["memory"] - 1, "none": 10**8}.items():
        lord_tune.plan(aligned_llama_dir, **SAME, gpu_memory=size, json=str(file))
        found[name] = json.loads(file.read_text())["journey"]
    assert found["less"]["fits"] and "4 sequences at once" in found["less"]["steps"]["train"]["told"]
    assert not found["none"]["fits"] and not found["none"]["steps"]["train"]["fits"]
    assert found["none"]["steps"]["export dense"]["fits"]  # of this machine's memory


def test_the_verdicts_are_shown_and_open_ranks_are_said(llama_dir, rows_file, capsys):
    options = {"kept_fraction": 0.8, "calibration": rows_file, "context_length": 64, "calibration_tokens": 512}
    found = lord_tune.plan(llama_dir, **options, gpu_memory="24GB")
    shown = capsys.readouterr().out
    assert "the whole way, on a GPU of 24.0 GB" in shown and "every layer alike, same size" in shown
    assert found["journey"]["steps"]["export vllm"]["fits"] and found["ranks"] is None
    with pytest.raises(UsageError, match="`gpu_memory` looks at one plan"):
        lord_tune.plan(llama_dir, sweep="s", calibration=rows_file, gpu_memory="24GB")
