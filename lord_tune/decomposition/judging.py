"""The errors of a layer that is finished, with Q, L and R as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from ..factorizations import OutputErrors, PlainSVD, feedback_alone, relative_error, truncate
from ..layers import FactoredLinear
from ..memory import give_back
from ..quantizers import E8P2, E8P3, E8P4, Quantizer, Rotated
from .base import EqualBits, LayerRecord

_REFERENCES = (E8P2, E8P3, E8P4)
COMPARED_INPUTS = 8192  # wider layers are not compared: feedback needs several Gram matrices


def judge(
    record: LayerRecord,
    layer: FactoredLinear,
    weight: Tensor,
    quantizer: Quantizer,
    calibration: Moments,
    heldout: InputStatistics | None,
    centre: Tensor | None,
    energy: Tensor | None,  # E||W x||^2, where it is known
) -> None:
    """Put the errors with Q, L and R as they are stored into the record, and those of Q alone and of a plain SVD."""
    dense = weight.double()
    if energy is None:
        energy = calibration.energies(dense).sum()
    assert layer.backbone is not None
    backbone = layer.backbone.dequantize(torch.float64)
    first = quantizer.dequantize(quantizer.quantize(weight), layer.plan.shape, torch.float64)
    rest = None if torch.equal(first, backbone) else dense - first  # W - Q where Q is rounded to the nearest
    residual = dense - backbone
    del first, backbone
    left, right = layer.dense_factors()
    if heldout is not None:
        record.error_heldout = relative_error(residual - left @ right, dense, heldout, centre)
    del dense
    errors = OutputErrors(residual, calibration, energy)
    record.error_backbone = errors(left[:, :0], right[:0])
    record.error_calibrated = errors(left, right, centre)
    if rest is not None:
        del errors, residual
        give_back()
        residual, errors = rest, OutputErrors(rest, calibration, energy)
    plain = truncate(residual, PlainSVD().spectrum(residual, None), layer.rank)
    record.error_plain = errors(plain.left, plain.right)


def measure_stored(
    record: LayerRecord,
    layer: FactoredLinear,
    weight: Tensor,
    calibration: Moments,
    heldout: InputStatistics | None,
    centre: Tensor | None,
) -> None:
    """Put the errors with L and R as they are stored into the record."""
    dense = weight.double()
    residual = dense - layer.dense_weight(torch.float64)
    before = record.error_calibrated
    record.error_calibrated = relative_error(residual, dense, calibration, centre)
    record.error_heldout = None if heldout is None else relative_error(residual, dense, heldout, centre)
    if record.error_beyond_top is not None and before:  # the same energy over another reference
        record.error_beyond_top = min(1.0, record.error_beyond_top * record.error_calibrated / before)


def equal_bits(weight: Tensor, calibration: Moments, heldout: InputStatistics | None) -> dict[str, EqualBits]:
    """Feedback rounding alone at 2, 3 and 4 bits: what the bits of L R would have bought without it."""
    dense = weight.double()
    found: dict[str, EqualBits] = {}
    forms: list[Any] = [Rotated(form()) for form in _REFERENCES]
    alone = feedback_alone(weight, calibration, forms, heldout)
    for form in forms:
        split = next(alone)
        assert split.parts is not None and split.backbone is not None
        residual = dense - split.backbone
        size = sum(t.numel() * t.element_size() for t in split.parts.values())
        found[form.name] = {
            "bits": 8.0 * size / dense.numel(),
            "calibrated": relative_error(residual, dense, calibration),
            "heldout": None if heldout is None else relative_error(residual, dense, heldout),
        }
        del split, residual  # not beside those of the next format
        give_back()
    return found
