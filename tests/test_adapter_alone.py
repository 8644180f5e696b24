"""`export --base`: an adapter that was trained later, for a base that is served already."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf_files import write_like
from peft import PeftModel
from tiny import save_tiny, tiny_llama, write_code_rows
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import lord_tune
import lord_tune.exports.gguf
from lord_tune.errors import UsageError

pytest.importorskip("compressed_tensors")
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """backbone -> a checkpoint, an adapter trained on it; like.gguf"""
    folder = tmp_path_factory.mktemp("runs")
    model, rows = tiny_llama(intermediate=192), write_code_rows(folder / "r.jsonl")
    save_tiny(model, folder / "m")
    write_like(model, folder / "like.gguf", "llama")
    for name in ("w4a16", "q4_0"):
        width = {"group_size": 32} if name == "w4a16" else {}
        lord_tune.decompose(str(folder / "m"), str(folder / name), backbone=name, rank=32, method="svd", **width)
        common = {"dataset_name": str(rows), "max_steps": 4, "max_length": 64, "learning_rate": 3e-3, "mode": "factors"}
        lord_tune.train(model_name_or_path=str(folder / name), output_dir=str(folder / f"{name}_sft"), **common)
    return folder


def test_it_runs_on_the_base_of_an_earlier_export(runs, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    lord_tune.export(str(runs / "w4a16"), str(first), "compressed-tensors")
    lord_tune.export(str(runs / "w4a16_sft"), str(second), "compressed-tensors", base=str(first))
    assert not (second / "base").exists() and f"`{first}`" in (second / "README.md").read_text()
    decoded = CompressedTensorsConfig(dequantize=True)
    base = AutoModelForCausalLM.from_pretrained(first / "base", quantization_config=decoded)
    ours, _ = lord_tune.load(str(runs / "w4a16_sft"))
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        found = PeftModel.from_pretrained(base, second / "adapter")(input_ids=IDS).logits
        expected = ours(input_ids=IDS).logits
    assert torch.allclose(found, expected, atol=1e-3) and not torch.allclose(found, before, atol=0.1)


def test_a_gguf_adapter_alone(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
    options = {"like": str(runs / "like.gguf"), "threshold": 0.1}
    lord_tune.export(str(runs / "q4_0"), str(tmp_path / "first"), "gguf", **options)
    lord_tune.export(str(runs / "q4_0_sft"), str(tmp_path / "e"), "gguf", base=str(tmp_path / "first"), **options)
    assert not (tmp_path / "e" / "model.gguf").exists()
    first, second = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / name / "adapter.gguf").tensors}
        for name in ("first", "e")
    )
    assert first.keys() == second.keys() and any((first[name] != second[name]).any() for name in first)


def test_another_base_is_refused_by_its_first_tensor(runs, tmp_path):
    other = tmp_path / "other"
    save_tiny(tiny_llama(intermediate=192, seed=5), tmp_path / "m")
    options = {"backbone": "w4a16", "group_size": 32, "method": "svd", "rank": 8}
    lord_tune.decompose(str(tmp_path / "m"), str(tmp_path / "d"), **options)
    lord_tune.export(str(tmp_path / "d"), str(other), "compressed-tensors")
    with pytest.raises(UsageError, match=r"differs from this model's in 'lm_head.weight'"):
        lord_tune.export(str(runs / "w4a16_sft"), str(tmp_path / "e"), "compressed-tensors", base=str(other))
    with pytest.raises(UsageError, match="holds no model.gguf"):
        like = str(runs / "like.gguf")
        lord_tune.export(str(runs / "q4_0_sft"), str(tmp_path / "e"), "gguf", base=str(other), like=like)
    with pytest.raises(UsageError, match="which writes no adapter"):
        lord_tune.export(str(runs / "q4_0_sft"), str(tmp_path / "e"), "dense", base=str(other))
    lord_tune.decompose(str(runs / "m"), str(tmp_path / "q"), **options | {"rank": 0})
    lord_tune.export(str(tmp_path / "q"), str(tmp_path / "alone"), "compressed-tensors")
    with pytest.raises(UsageError, match="no L R that goes into an adapter"):
        lord_tune.export(str(tmp_path / "q"), str(tmp_path / "e"), "compressed-tensors", base=str(tmp_path / "alone"))
    assert not (tmp_path / "e").exists()
    with pytest.raises(UsageError, match="`base` lies in OUT"):
        lord_tune.export(str(runs / "w4a16_sft"), str(other), "compressed-tensors", base=str(other), overwrite=True)
    assert (other / "base").is_dir()
