"""Exports are compared with the model by what it is used for: the softmax of tokens, or the outputs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import CLASSIFIERS, bert_config, llama_config, save_tiny, tiny_head

import lord_tune
from lord_tune.errors import ExportMismatch
from lord_tune.exports import dense, factored
from lord_tune.exports.verify import compare


def decomposed(model: Any, folder: Path, **options: Any) -> str:
    base = save_tiny(model, folder / "base")
    lord_tune.decompose(str(base), str(folder / "out"), method="svd", rank=8, backbone="int4", **options)
    return str(folder / "out")


def regression() -> Any:
    config = bert_config()
    config.update({"num_labels": 1, "problem_type": "regression"})
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def several() -> Any:
    config = llama_config()
    config.update({"num_labels": 5, "problem_type": "multi_label_classification"})
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).eval()


HEADS = {name: lambda name=name: tiny_head(name) for name in CLASSIFIERS}
HEADS |= {"regression": regression, "several labels": several}


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("head", ["reward", "regression", "several labels"])
def test_a_wrong_export_of_a_head_for_labels_is_noticed(head, form, tmp_path, monkeypatch):
    """Of one output softmax makes 1 whatever it is, and of several it does not see what is added to all."""
    out = decomposed(HEADS[head](), tmp_path)
    good = lord_tune.export(out, str(tmp_path / "good"), form)["comparison"]
    assert good["kl"] is None and good["relative_difference"] < 1e-5 and good["top1_agreement"] is None
    assert good["tokens"] == 8

    def corrupted(model: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        write(model, tokenizer, folder, *rest)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(key for key in ("score.weight", "classifier.weight") if key in tensors)
        rows = tensors[name]
        save_file(tensors | {name: rows + 0.02 * rows.abs().mean()}, file, {"format": "pt"})

    module, name = {"dense": (dense, "save_dense"), "factored": (factored, "save_factored")}[form]
    write = getattr(module, name)
    monkeypatch.setattr(module, name, corrupted)
    with pytest.raises(
        ExportMismatch, match=r"got a relative difference of the outputs of \S+, expected at most 0.001"
    ):
        lord_tune.export(out, str(tmp_path / "bad"), form)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_exported(head, tmp_path):
    out = decomposed(HEADS[head](), tmp_path)
    found = lord_tune.export(out, str(tmp_path / "dense"), "dense")["comparison"]
    assert found["relative_difference"] < 1e-5
    half = lord_tune.export(out, str(tmp_path / "half"), "dense", dtype="bfloat16")["comparison"]
    assert 1e-4 < half["relative_difference"] < 0.1


@pytest.mark.own_process
def test_a_peft_export_of_a_reward_model_is_compared_by_stock_libraries(tmp_path):
    config = llama_config(intermediate=192)
    config.update({"num_labels": 1, "quantization_config": None})
    torch.manual_seed(0)
    base = save_tiny(transformers.LlamaForSequenceClassification(config).eval(), tmp_path / "base")
    lord_tune.decompose(str(base), str(tmp_path / "out"), method="svd", rank=8, backbone="nf4")
    found = lord_tune.export(str(tmp_path / "out"), str(tmp_path / "peft"), "peft")["comparison"]
    assert found["kl"] is None and found["tokens"] == 8 and found["relative_difference"] < 1e-4


def test_one_output_is_compared_as_it_is():
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.5]])
    assert compare(one, other).kl == 0  # which is why it does not decide
    found = compare(one, other, tokens=False)
    assert found.deviation()[1] == pytest.approx(0.5 / 5**0.5) and found.limit(["float32", "float16"]) == 1e-2
