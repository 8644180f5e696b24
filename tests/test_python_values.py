"""What Python may hand over in place of an option's own form, and what it is told where it may not."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from tiny import tiny_llama, tiny_tokenizer

import lord_tune
from lord_tune.config import CompareConfig, DecomposeConfig, EvaluateConfig, PlanConfig, ReportConfig, TrainConfig
from lord_tune.errors import UsageError


def test_one_name_is_a_list_of_one():
    plan = PlanConfig.build({"model": "m", "bits_per_weight": 4, "allocation": "mixed", "mix": "nf4"})
    assert plan.mix == ["nf4"]
    decompose = DecomposeConfig.build({"model": "m", "out": "o", "rank": 4, "calibration": Path("x.jsonl")})
    assert decompose.calibration == ["x.jsonl"]
    assert EvaluateConfig.build({"model": "m", "text": "x.txt"}).text == ["x.txt"]
    assert EvaluateConfig.build({"model": "m", "tasks": "piqa,copa", "tasks_dir": "t"}).task_names == ["piqa", "copa"]
    compare = {"model": "m", "out": "o", "methods": "svd", "text": ("a", Path("b")), "max_bytes": 10**6}
    built = CompareConfig.build(compare | {"steps": 4, "learning_rate": 1e-4, "dataset_name": Path("rows.jsonl")})
    assert (built.methods, built.text, built.rates()) == (["svd"], ["a", "b"], [1e-4])
    assert built.dataset_name == "rows.jsonl"
    assert ReportConfig.build({"runs": Path("runs") / "nf4"}).runs == ["runs/nf4"]


def test_a_path_is_its_text(llama_dir, rows_file, tmp_path):
    report = lord_tune.decompose(llama_dir, tmp_path / "out", rank=4, method="whitened", calibration=rows_file,
                                 context_length=64, calibration_tokens=512)  # fmt: skip
    assert report["calibration"]["source"] == [str(rows_file)]
    assert lord_tune.evaluate(tmp_path / "out", str(rows_file), context_length=64, max_tokens=128)["tokens"] > 0


def test_what_is_in_memory_is_refused_in_a_sentence():
    model = tiny_llama(layers=1)
    with pytest.raises(UsageError, match=r"^Got a loaded model \(LlamaForCausalLM\) for `model`; pass the folder .*it"):
        lord_tune.decompose(model, "out", rank=4)
    model.config._name_or_path = "somewhere/tiny"
    with pytest.raises(UsageError, match=r"it was loaded from somewhere/tiny.*model.save_pretrained\(FOLDER\)"):
        lord_tune.evaluate(model, "x.txt")
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(UsageError, match=r"data set in memory \(Dataset\) for `dataset_name`; write it first"):
        TrainConfig.build({"model_name_or_path": "m", "output_dir": "o", "dataset_name": rows})
    with pytest.raises(UsageError, match="data set in memory .* for `calibration`"):
        lord_tune.decompose("m", "out", rank=4, calibration=[rows])
    with pytest.raises(UsageError, match="an object of the type .* for `model`; pass the path or name as text"):
        lord_tune.plan(tiny_tokenizer())


def test_a_long_value_is_shown_in_short():
    with pytest.raises(UsageError) as told:
        lord_tune.decompose("m", "out", rank=tiny_llama())
    assert "for `rank`" in str(told.value) and len(str(told.value)) < 250
