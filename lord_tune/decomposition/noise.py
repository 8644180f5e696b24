"""What rounding to each format does to a layer's outputs, for budgets that choose among formats (choices.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..calibration.moments import Moments
from ..factorizations import Projection
from ..memory import give_back
from ..quantizers import Quantizer, Rotated
from ..quantizers.ldlq import Feedback, round_with_feedback
from .choices import Noise

FORESEEN_DAMPING = 0.1  # of H, where the writing pass chooses it
_PARTS = ("energies", "spread", "whole")

Formats = Mapping[str, tuple[Quantizer | None, bool]]  # backbone -> its format, whether L R beside it is a choice


def noise_by_format(
    weight: Tensor,
    basis: Tensor,  # (out, k)
    calibration: Moments,
    method: Projection,  # that fits L R to what rounding leaves, and in whose metric that is measured
    formats: Formats,
    output_gram: Tensor | None,
    noticed: Tensor | None = None,  # (in, in): H_g, see Projection.energies
) -> dict[str, Noise]:
    """Backbone -> noise."""
    found: dict[str, Noise] = {}
    feedbacks: dict[tuple[int, bool], Feedback] = {}
    for name, (quantizer, ranked) in formats.items():
        assert quantizer is not None, "a backbone has a format"
        left = weight.double() - _foreseen(weight, calibration, quantizer, method, feedbacks)
        found[name] = _noise(left, basis, calibration, method, ranked, output_gram, noticed)
        del left
        give_back()
    return found


def noise_tensors(noise: Mapping[str, Noise]) -> dict[str, Tensor]:
    """For a safetensors file."""
    return {f"noise.{part}.{name}": getattr(own, part) for name, own in noise.items() for part in _PARTS}


def noise_of(tensors: Mapping[str, Tensor]) -> dict[str, Noise]:
    """backbone -> what `noise_tensors` made of it."""
    names = [key.removeprefix("noise.whole.") for key in tensors if key.startswith("noise.whole.")]
    return {name: Noise(*(tensors[f"noise.{part}.{name}"] for part in _PARTS)) for name in names}


def _foreseen(
    weight: Tensor,
    calibration: Moments,
    quantizer: Quantizer,
    method: Projection,
    feedbacks: dict[tuple[int, bool], Feedback],  # of the layer's inputs, by what they depend on
) -> Tensor:
    """Q (out, in) float64 about as the writing pass will round it, which also chooses damping and scales."""
    if method.rounding == "nearest":
        return method.rounded(weight, calibration, quantizer)[1]
    key = quantizer.block, isinstance(quantizer, Rotated)
    if key not in feedbacks:
        feedbacks[key] = Feedback.of(quantizer.turned_gram(calibration.gram), FORESEEN_DAMPING, quantizer.block)
    return round_with_feedback(quantizer, weight, feedbacks[key])[1]


def _noise(
    left: Tensor,  # (out, in) float64: W - Q
    basis: Tensor,  # (out, k)
    calibration: Moments,
    method: Projection,
    ranked: bool,  # whether there is L R
    output_gram: Tensor | None,
    noticed: Tensor | None,
) -> Noise:
    moved = left @ calibration.gram
    whole = (left * moved).sum()
    spread = ((basis.T @ left) * (basis.T @ moved)).sum(1)
    del moved
    if not ranked and output_gram is None:
        return Noise(whole[None].clone(), spread, whole)
    return Noise(method.energies(left, calibration, output_gram, ranked, noticed), spread, whole)
