"""What is stored of a packed matrix: dtypes that no cast changes, shapes that every loader takes, scales that fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from contracts import QUANTIZERS
from safetensors.torch import load_file, save_file

import lord_tune
from lord_tune.errors import LordWarning
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import CastLinear, QuantizedLinear, factored_layers
from lord_tune.quantizers import E8P2, E8P4, NF4, Int2, Int4, Int8, Lloyd2, Lloyd4, Rotated, SpQR


@pytest.mark.parametrize("form", QUANTIZERS, ids=str)
def test_no_part_is_without_dimensions(form):
    """FSDP2 refuses to shard a scalar."""
    weight = torch.randn(33, 40)
    for parts in (form.empty((33, 40), "meta"), form.quantize(weight)):
        assert all(part.dim() for part in parts.values())
    expected = {name: (part.shape, part.dtype) for name, part in form.quantize(weight).items()}
    assert {name: (part.shape, part.dtype) for name, part in form.empty((33, 40), "meta").items()} == expected


@pytest.mark.parametrize("form", QUANTIZERS, ids=str)
def test_a_cast_of_the_model_leaves_the_parts_alone(form):
    layer = QuantizedLinear(40, 33, form)
    layer.set_parts(form.quantize(torch.randn(33, 40)))
    before, expected = layer.parts(), layer.dequantize()
    model = torch.nn.Sequential(layer, torch.nn.Linear(33, 2))
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        cast(model)
        assert all(torch.equal(part, before[name]) for name, part in layer.parts().items())
        assert {p.dtype for p in model[1].parameters()} != {torch.float32}
    assert torch.equal(layer.dequantize(), expected)
    assert {part.device.type for part in model.to("meta")[0].parts().values()} == {"meta"}  # it moves all the same


def test_a_cast_of_the_model_leaves_factors_alone():
    factor = CastLinear(4, 3, torch.float32)
    torch.nn.init.normal_(factor.weight)
    before = factor.weight.clone()
    assert torch.equal(factor.bfloat16().weight, before)
    assert factor(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert factor.to("meta").weight.is_meta


def test_a_checkpoint_with_a_scalar_offset_loads(llama_dir, tmp_path):
    """As versions before this one wrote nested_offset."""
    out = tmp_path / "new"
    lord_tune.decompose(str(llama_dir), str(out), method="svd", rank=4, backbone="nf4", double_quant=True)
    expected = load_dense_or_factored(str(out))
    offsets = {}
    for file in Path(out).glob("*.safetensors"):
        tensors = load_file(file)
        offsets |= {n: t.shape for n, t in tensors.items() if n.endswith("nested_offset")}
        old = {n: t.reshape(()) if n.endswith("nested_offset") else t for n, t in tensors.items()}
        save_file(old, file, {"format": "pt"})
    assert offsets and set(offsets.values()) == {(1,)}
    ids = torch.arange(12)[None]
    loaded = load_dense_or_factored(str(out))
    assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert all(p.dim() for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["layers"]
    assert len(factored_layers(loaded)) == len(factored_layers(expected))


FLOAT16 = [Int2(), Int4(), Int8(), Int8(symmetric=True), Lloyd2(), Lloyd4(), E8P2(), E8P4(), SpQR(), Rotated(E8P2())]


@pytest.mark.parametrize("form", FLOAT16, ids=str)
@pytest.mark.parametrize("size", [1e5, 1e-6, 1e-8, 1e-12])
def test_scales_that_float16_cannot_hold_saturate_with_a_warning(form, size):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * size
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoded = form.dequantize(form.quantize(weight), (32, 128), torch.float32)
        rounder = form.inner.rounder if isinstance(form, Rotated) else form.rounder
        assert all(torch.isfinite(part.float()).all() for part in rounder(weight, 2.0).parts().values())
    assert torch.isfinite(decoded).all()
    error = float((weight - decoded).norm() / weight.norm())
    # at worst about what a matrix of zeros is off; NaN, or 2.5 times that, before
    assert error < 1.05
    told = [str(w.message) for w in seen if issubclass(w.category, LordWarning)]
    assert size in (1e5, 1e-6) or told  # two bits reach further up and down than eight


@pytest.mark.parametrize("form", FLOAT16, ids=str)
def test_ordinary_scales_say_nothing(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        form.quantize(torch.randn(32, 128) * 0.02)
        form.quantize(torch.zeros(32, 128))
        form.quantize(torch.randn(32, 1).expand(32, 128))  # groups whose scale is the rounding of their minimum


def test_a_weight_of_micros_keeps_its_digits():
    """int8 at 1e-6 was 2.5 times worse than zero: every scale underflowed to 0."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 1e-6
    with pytest.warns(LordWarning, match="outside the range of float16"):
        decoded = Int8().dequantize(Int8().quantize(weight), (16, 128), torch.float32)
    # steps of 2^-24 = 6e-8: a uniform error of 0.29 steps
    assert float((weight - decoded).norm() / weight.norm()) < 0.025
    assert NF4().dequantize(NF4().quantize(weight), (16, 128), torch.float32).abs().max() > 1e-6
