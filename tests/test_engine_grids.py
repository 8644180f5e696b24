"""The integer grids of inference engines, against the engines' own libraries."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from contracts import inputs, moments_of, weight

from lord_tune.errors import UsageError
from lord_tune.factorizations import METHODS
from lord_tune.quantizers import QUANTIZERS, ldlq, make_quantizer
from lord_tune.quantizers.engines import gguf_blocks
from lord_tune.quantizers.packing import unpack_values, word_table

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # q2_0 is newer than the package
SHAPE = (48, 192)


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def decoded(form, parts) -> torch.Tensor:
    return form.dequantize(parts, SHAPE, torch.float32)


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("fed", [False, True], ids=["nearest", "feedback"])
def test_ggml_decodes_our_blocks_to_the_same_numbers(name, fed):
    form, w = make_quantizer(name), weight(SHAPE)
    parts = form.quantize(w)
    if fed:
        parts, _ = METHODS["whitened"]().rounded(w, moments_of(inputs(SHAPE[1])), form)
    theirs = gguf.quants.dequantize(gguf_blocks(form, parts, SHAPE).numpy(), kind(name))
    assert np.array_equal(theirs, decoded(form, parts).numpy())


@pytest.mark.parametrize("name", GGUF)
def test_what_ggml_rounded_is_on_our_grid(name):
    """Its decoded weights are stored unchanged, and its error is no smaller than ours by more than chance."""
    w = weight(SHAPE).float()
    theirs = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind(name)), kind(name)))
    form = make_quantizer(name)
    again = decoded(form, form.quantize(theirs))
    # an affine scale is the difference of two rounded ends, and may be off by its last bit
    assert torch.allclose(again, theirs, atol=0 if form.symmetric else 1e-3 * float(theirs.abs().max()))
    assert float((w - decoded(form, form.quantize(w))).norm() / (w - theirs).norm()) < 1.02


def test_blocks_of_two_bits_are_minus_one_to_two_low_bits_first():
    """ggml's block_q2_0: a float16 d, then 64 codes, four to a byte; weight = (code - 1) d."""
    form = make_quantizer("q2_0")
    parts = form.quantize(weight(SHAPE))
    blocks = gguf_blocks(form, parts, SHAPE).numpy().reshape(SHAPE[0], -1, 18)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.stack([(blocks[..., 2:] >> shift) & 3 for shift in (0, 2, 4, 6)], -1).reshape(*blocks.shape[:2], 64)
    assert np.array_equal(((codes.astype(np.float32) - 1) * d).reshape(SHAPE), decoded(form, parts).numpy())
    assert len(np.unique(codes)) == 4


@pytest.mark.parametrize("name", ["w2a16", "w4a16", "w8a16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compressed_tensors_decodes_our_codes_to_the_same_numbers(name, symmetric, group_size, dtype):
    """With the scales in the dtype of the model, as it stores them; a group of a whole row is a channel."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    form = make_quantizer(name, {"group_size": group_size, "symmetric": symmetric})
    parts = form.quantize(weight(SHAPE))
    codes = unpack_values(parts["weight"], word_table(torch.arange(2.0**form.bits), form.bits), form.bits, SHAPE)
    signed = (codes - 2 ** (form.bits - 1)).to(torch.int8)
    packed = helpers.pack_to_int32(signed, form.bits)
    assert torch.equal(helpers.unpack_from_int32(packed, form.bits, torch.Size(SHAPE)), signed)
    scale = parts["scales"].to(dtype)
    assert torch.equal(scale.float(), parts["scales"].float())
    zero = None if symmetric else (parts["zeros"].int() - 2 ** (form.bits - 1)).to(torch.int8)
    strategy = {"strategy": "channel"} if group_size > SHAPE[1] else {"strategy": "group", "group_size": group_size}
    arguments = QuantizationArgs(num_bits=form.bits, symmetric=symmetric, **strategy)
    theirs = dequantize(signed, scale.float(), zero, arguments, dtype=torch.float32)
    assert torch.equal(theirs, decoded(form, parts))


@pytest.mark.parametrize("name", (*GGUF, "q2_0"))
def test_blocks_of_another_size_are_refused(name):
    """Options of a plan file: the manifest does not hold them, so that a reload would decode other groups."""
    for options in ({"group_size": 16}, {"symmetric": not make_quantizer(name).symmetric}):
        with pytest.raises(UsageError, match="are no choice"):
            make_quantizer(name, options)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_wide_layers_are_fitted_in_pieces_to_the_same_parts(name, rotated, monkeypatch):
    """Rows do not depend on each other; the largest number of weights rounded side by side is that of 64 rows here."""
    form, w = make_quantizer(name, {"incoherence": rotated}), weight((150, 40)).float()
    gram = form.turned_gram(moments_of(inputs(40)).gram)
    whole = ldlq.fitted(form, w, gram)
    monkeypatch.setattr(ldlq, "STACKED", 64 * 40 * len(ldlq.STRETCHES))
    pieces = ldlq.fitted(form, w, gram)
    # another order of float32 sums may move a weight on an edge, and what follows it
    assert float((whole.backbone - pieces.backbone).norm() / whole.backbone.norm()) < 0.02
    assert {k: v.shape for k, v in pieces.parts.items()} == {
        k: v.shape for k, v in form.empty((150, 40), "meta").items()
    }


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name[0] in "qw"])
def test_a_model_may_be_cast(name):
    """Scales are stored where no cast reaches them, so that Q in bfloat16 is the rounded Q of float32."""
    form = make_quantizer(name)
    parts = form.quantize(weight(SHAPE))
    assert torch.equal(form.dequantize(parts, SHAPE, torch.bfloat16), decoded(form, parts).bfloat16())
