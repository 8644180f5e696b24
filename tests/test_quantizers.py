"""The laws of a quantizer."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from contracts import QUANTIZERS, weight

from lord_tune.errors import UsageError
from lord_tune.layers import QuantizedLinear
from lord_tune.quantizers import NF4
from lord_tune.quantizers import QUANTIZERS as BY_NAME

every = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
shapes = pytest.mark.parametrize("shape", [(8, 64), (7, 33), (64, 64), (1, 5), (96, 160)], ids=str)


def test_every_quantizer_has_a_row():
    assert {type(q) for q in QUANTIZERS} == set(BY_NAME.values())


@every
@shapes
def test_empty_has_the_shapes_and_dtypes_of_quantize(quantizer, shape):
    real, meta = quantizer.quantize(weight(shape)), quantizer.empty(shape, "meta")
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in meta.items()}


@every
@shapes
def test_decoded_values_are_a_fixed_point(quantizer, shape):
    """Q is on the format's own grid: quantizing it again returns it (double quantization moves the scales a little)."""
    q = quantizer.dequantize(quantizer.quantize(weight(shape)), shape, torch.float32)
    again = quantizer.dequantize(quantizer.quantize(q), shape, torch.float32)
    # NF4: the largest code of a block is exactly 1, so absmax is kept and every value is its own nearest code.
    # Double quantization codes the (already rounded) scales once more: their 8-bit step is under 2 % of the largest.
    tolerance = 0.02 * float(q.abs().max()) if quantizer.double_quant else 0.0
    assert float((again - q).abs().max()) <= tolerance


@every
def test_error_is_that_of_four_bits(quantizer):
    """NF4 of Gaussian weights has a relative error near 0.09 at block 64, less than 0.13 at block 256."""
    w = weight((96, 160))
    q = quantizer.dequantize(quantizer.quantize(w), (96, 160), torch.float64)
    assert 0.05 < float((w - q).norm() / w.norm()) < 0.13


@every
@shapes
def test_linear_multiplies_by_the_decoded_tensor_and_has_its_gradient(quantizer, shape):
    parts = quantizer.quantize(weight(shape))
    q = quantizer.dequantize(parts, shape, torch.float32)
    x = torch.randn(3, shape[1], requires_grad=True)
    y = quantizer.linear(x, parts, shape)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.allclose(y, x @ q.T, atol=1e-5) and torch.allclose(x.grad, upstream @ q, atol=1e-5)


def test_nf4_is_bitsandbytes_own_rounding():
    w = weight((32, 64)).float()
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    parts = NF4().quantize(w)
    assert torch.equal(parts["weight"], packed) and torch.equal(parts["absmax"], state.absmax)
    assert torch.equal(NF4().dequantize(parts, (32, 64), torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / 64 / 256)])
def test_stored_bits_are_the_formats(double_quant, bits):
    parts = NF4(double_quant=double_quant).quantize(weight((512, 512)))
    stored = 8 * sum(t.numel() * t.element_size() for t in parts.values()) / 512**2
    assert stored == pytest.approx(bits, rel=1e-3)


def test_bad_block_size_is_refused():
    with pytest.raises(UsageError, match="block size 48"):
        NF4(block_size=48)


def test_quantized_linear_saves_codes_not_a_dense_copy_for_backward():
    layer = QuantizedLinear(64, 96, NF4())
    layer.set_parts(NF4().quantize(weight((96, 64))))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    assert sum(kept) < 96 * 64  # a dense float32 copy would be 4 bytes per weight


def test_adding_to_the_packed_weight_fails_loudly():
    layer = QuantizedLinear(64, 96, NF4())
    with pytest.raises(RuntimeError):
        layer.weight.data += torch.zeros(96, 64)
