"""A source with an adapter is read by blocks as well: Q, embeddings and head stay in their files until used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_family, tiny_llama

import lord_tune
from lord_tune.adapters.attach import add_lora, add_scales, expose_factors, has_adapters
from lord_tune.adapters.basis import add_basis
from lord_tune.adapters.fold import fold
from lord_tune.exports.source import Source, open_source
from lord_tune.exports.verify import outputs_of
from lord_tune.integrations import checkpoint
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers

IDS = torch.randint(0, 255, (1, 48), generator=torch.Generator().manual_seed(0))


def stock(**options: Any) -> Callable[[Any], Any]:
    """An adapter of PEFT alone."""
    return lambda model: get_peft_model(model, LoraConfig(r=4, **options))


# family, its dtype, how it is decomposed, the adapter, what stays in the files
Q = "backbone"
CASES: dict[str, tuple[Callable[[], Any], torch.dtype, dict[str, Any], Callable[[Any], Any], list[str]]] = {
    "factors": (tiny_llama, torch.bfloat16, {}, expose_factors, [Q, "embed_tokens", "lm_head"]),
    "lora": (tiny_llama, torch.float32, {}, add_lora, [Q, "embed_tokens", "lm_head"]),
    "scales": (tiny_llama, torch.float32, {}, add_scales, [Q, "embed_tokens", "lm_head"]),
    "basis": (tiny_llama, torch.float32, {}, lambda model: add_basis(model, 3), [Q, "embed_tokens", "lm_head"]),
    "split": (
        tiny_llama,
        torch.float32,
        {"top_rank": 2, "factor_format": "nf4"},
        lambda model: expose_factors(model, mode="split"),
        [Q, "embed_tokens", "lm_head"],
    ),
    "pivoted": (tiny_llama, torch.float32, {"backbone": "none"}, expose_factors, ["embed_tokens", "lm_head"]),
    "some layers": (
        tiny_llama,
        torch.bfloat16,
        {},
        lambda m: expose_factors(m, "q_proj"),
        [Q, "embed_tokens", "lm_head"],
    ),
    "experts": (lambda: tiny_family("mixtral"), torch.float32, {}, expose_factors, [Q, "embed_tokens", "lm_head"]),
    "table": (tiny_llama, torch.bfloat16, {"embeddings": "int8"}, expose_factors, [Q, "embed_tokens", "lm_head"]),
    "around layers": (tiny_llama, torch.float32, {}, stock(target_modules=["up_proj"]), [Q, "embed_tokens", "lm_head"]),
    "trained head": (
        tiny_llama,
        torch.float32,
        {},
        stock(target_modules=["up_proj"], modules_to_save=["lm_head"]),
        [Q],
    ),
    "embedding": (tiny_llama, torch.float32, {}, stock(target_modules=["embed_tokens"]), [Q]),
    "conv1d": (lambda: tiny_family("gpt2"), torch.float32, {}, expose_factors, [Q, "wte"]),
}


def trained(case: str, folder: Path) -> str:
    """A training output with values that training could have left."""
    build, dtype, options, adapt, _ = CASES[case]
    base = save_tiny(build().to(dtype), folder / "base")
    given = {"method": "svd", "backbone": "int4", "rank": 8} | options
    lord_tune.decompose(base, folder / "factored", **given)
    model = adapt(load_dense_or_factored(str(folder / "factored")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder / "adapter"))
    return str(folder / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_the_folded_model_are_those_of_the_whole_one(case, tmp_path):
    adapter = trained(case, tmp_path)
    whole, _ = lord_tune.load(adapter)
    expected, folded = outputs_of(whole, IDS), fold(whole)
    (tmp_path / "scratch").mkdir()
    source, _ = open_source(adapter, tmp_path / "scratch")
    kinds = (Q, "embed_tokens", "lm_head", "wte")
    assert {kind for name in source.absent for kind in kinds if f".{kind}." in f".{name}"} == {*CASES[case][4]}
    absent = [name for name, parameter in source.model.named_parameters() if parameter.is_meta]
    assert torch.equal(source.outputs(IDS), expected)
    assert [name for name, parameter in source.model.named_parameters() if parameter.is_meta] == absent
    found = source.folded()
    assert not has_adapters(found) and any(tensor.is_meta for tensor in found.state_dict().values())
    source.load(found.state_dict())
    values = found.state_dict()
    assert values.keys() == folded.state_dict().keys()
    for name, tensor in folded.state_dict().items():
        assert values[name].dtype == tensor.dtype and torch.equal(values[name], tensor), name
    plans = [{name: layer.plan for name, layer in factored_layers(model).items()} for model in (found, folded)]
    assert plans[0] == plans[1]
    assert torch.equal(outputs_of(found, IDS), outputs_of(folded, IDS))


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("case", ["factors", "lora"])
def test_what_is_written_is_what_a_model_in_memory_gives(case, form, tmp_path, monkeypatch):
    adapter = trained(case, tmp_path)
    lord_tune.export(adapter, str(tmp_path / "by blocks"), form)
    monkeypatch.setattr("lord_tune.commands.open_source", loaded_whole)
    lord_tune.export(adapter, str(tmp_path / "whole"), form)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "by blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def loaded_whole(name: str, scratch: Path) -> tuple[Source, Any]:
    model, tokenizer = lord_tune.load(name)
    return Source(model), tokenizer


WHOLE = {
    "around Q": (torch.float32, stock(target_modules=["backbone"]), torch.float32),
    "dense layers of 16 bits": (torch.bfloat16, stock(target_modules=["lm_head"]), torch.float32),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_needs_more_is_loaded_whole(case, tmp_path):
    dtype, adapt, expected = WHOLE[case]
    CASES[case] = (tiny_llama, dtype, {}, adapt, [])
    adapter = trained(case, tmp_path)
    (tmp_path / "scratch").mkdir()
    source, _ = open_source(adapter, tmp_path / "scratch")
    assert not source.absent and not any(parameter.is_meta for parameter in source.model.parameters())
    assert source.model.dtype == expected
    found = lord_tune.export(adapter, str(tmp_path / "out"), "dense")
    assert found["comparison"]["kl"] < 1e-5


def test_an_adapter_whose_fold_needs_values_is_folded_whole(tmp_path, monkeypatch):
    """A scaling that is not 1 brings what the adapter started from into the sum, on the device of Q."""
    adapter = trained("factors", tmp_path)
    (tmp_path / "scratch").mkdir()
    source, _ = open_source(adapter, tmp_path / "scratch")
    halved(source.model)
    load = source._again
    monkeypatch.setattr(source, "_again", lambda: halved(load()))
    expected = fold(halved(lord_tune.load(adapter)[0])).state_dict()
    found = source.folded()
    source.load(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.state_dict()[name], tensor), name


def halved(model: Any) -> Any:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, 0.5)
    return model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_large_tables_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch, dtype):
    """The tables of tests are small: the limit is made so that no step is the whole or divides it."""
    base = save_tiny(tiny_llama(), tmp_path / "base")
    monkeypatch.setattr(checkpoint, "READ_AT_ONCE", 7 * 64)
    opened = checkpoint.Checkpoint(str(base), dtype, tmp_path / "scratch")
    reads = []
    monkeypatch.setattr(opened, "_read", lambda name: reads.append(name))
    whole = load_dense_or_factored(str(base), dtype).state_dict()
    names = [name for name in whole if name.endswith("weight") and whole[name].dim() == 2]
    names = [name for name in names if name in opened._present]
    opened.load(names)
    assert len(names) > 7 and not reads
    for name in names:
        own = opened.model.get_parameter(name)
        assert own.dtype == whole[name].dtype and torch.equal(own, whole[name]), name
