"""CALDERA on synthetic layers whose inputs are as correlated as a language model's; tolerances are bounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contracts import inputs, moments_of, weight

from lord_tune.errors import UsageError
from lord_tune.factorizations import FactorForm, LoftQ, PlainSVD, Whitened, relative_error
from lord_tune.factorizations.caldera import Caldera
from lord_tune.quantizers import E8P2, NF4, Int2, Int4, Lloyd2, Lloyd4, Rotated

SHAPE = (64, 96)
W = weight(SHAPE)
X = inputs(96, tokens=2048)
MOMENTS, HELDOUT = moments_of(X), moments_of(inputs(96, tokens=1024, seed=5))


def error(split) -> float:
    residual = W - split.backbone - split.factors.product()
    return relative_error(residual, W, MOMENTS)


@pytest.mark.parametrize("form", [Rotated(E8P2()), Rotated(Lloyd2()), Int4(), NF4(block_size=32)], ids=str)
def test_it_beats_what_it_is_made_of(form):
    """Below feedback alone and below plain rounding with the optimal low rank, at the same bits."""
    split = Caldera(iterations=3).split(W, MOMENTS, 8, form)
    alone = Caldera().split(W, MOMENTS, 0, form)
    whitened = Whitened(0.0).split(W, MOMENTS, 8, form)
    assert error(split) < 0.9 * error(alone) and error(split) < error(whitened) < error(
        PlainSVD().split(W, MOMENTS, 8, form)
    )


def test_it_beats_loftq_at_two_bits():
    split = Caldera(iterations=3).split(W, MOMENTS, 8, Rotated(E8P2()))
    assert error(split) < 0.55 * error(LoftQ().split(W, None, 8, Int2()))


@pytest.mark.parametrize("factor_format", [None, Lloyd4(), Lloyd2()], ids=str)
def test_more_iterations_are_never_worse_and_never_worse_than_feedback_alone(factor_format):
    form = Rotated(Lloyd2())
    method = Caldera(factor_form=None if factor_format is None else FactorForm(factor_format))
    errors = [error(dataclasses.replace(method, iterations=n).split(W, MOMENTS, 4, form)) for n in (1, 2, 4)]
    alone = error(method.split(W, MOMENTS, 0, form))
    assert errors[0] <= alone + 1e-12 and all(b <= a + 1e-12 for a, b in zip(errors, errors[1:], strict=False))


def test_rounded_factors_are_what_is_stored():
    split = Caldera(iterations=2, factor_form=FactorForm(Lloyd4())).split(W, MOMENTS, 8, Rotated(E8P2()))
    factors = split.factors
    for parts, value in ((factors.left_parts, factors.left), (factors.right_parts, factors.right)):
        assert torch.equal(Lloyd4().dequantize(parts, tuple(value.shape), torch.float64), value)


def test_damping_is_chosen_on_other_text():
    """With fewer tokens than inputs feedback overfits; judging on held-out text is never worse there."""
    few = moments_of(X[:, :64])
    splits = [Caldera().split(W, few, 0, Rotated(Lloyd2()), heldout) for heldout in (None, HELDOUT)]
    errors = [relative_error(W - split.backbone, W, HELDOUT) for split in splits]
    assert errors[1] <= errors[0] * 1.05  # the stretch of the scales is chosen on the calibration text


def test_dead_inputs_and_few_tokens_stay_finite():
    x = X[:, :20].clone()
    x[..., 3] = 0
    split = Caldera(iterations=2).split(W, moments_of(x), 8, Rotated(E8P2()))
    assert torch.isfinite(split.factors.left).all() and torch.isfinite(split.backbone).all()
    assert relative_error(W - split.backbone, W, HELDOUT) < 1


def test_it_needs_a_backbone():
    with pytest.raises(UsageError, match="--backbone e8-2"):
        Caldera().split(W, MOMENTS, 4, None)
