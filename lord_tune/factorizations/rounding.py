"""L and R in low precision: each is rounded with error feedback and the other is fitted to it (LPLR, Saha et al.,
arXiv 2310.11028; in CALDERA, arXiv 2405.18886, algorithm 2, with plain rounding).

    R = L^+ A, rounded with feedback under H;   L = A H R^T (R H R^T)^-1, rounded with feedback under R H R^T

for min tr((A - L R) H (A - L R)^T); the best pair is kept. Measured on SmolLM2, layer 10, q_proj at rank 128 (error
before rounding 0.140): E8 at 2 bits 0.69 by plain rounding, 0.33 in rotated coordinates, 0.19 there with feedback; at 4
bits 0.50, 0.17 and 0.14.

Pivoted factors (pivoting.py) are rounded alike: B as R, C as L for the rows that B does not hold. The rows that it
holds have no C to correct them, and are as large as each other, so that rounding hides the weak directions of their
span: at equal rank pivoted factors mostly err more than L and R, but at equal bytes their rank is higher.
Same model and layer, calibrated error of L and R of rank 128 / 256 / 384 against C and B of as many bytes (q_proj 576 x
576: rank 144 / 376 / 568, down_proj 576 x 1536: 136 / 296 / 496):

    q_proj       NF4         0.157 0.090 0.055  against  0.142 0.053 0.031
    q_proj       E8, 2 bits  0.194 0.134 0.108  against  0.206 0.117 0.099
    down_proj    NF4         0.479 0.307 0.186  against  0.478 0.286 0.120
    down_proj    E8, 2 bits  0.514 0.364 0.268  against  0.532 0.359 0.216

The first components carry most of the energy, and their rounding error costs most: `top` of them can be stored in
another, finer format (or in 16 bits, to be trained); the rest is fitted to what these leave.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..linalg import solve_psd
from ..quantizers import Quantizer
from ..quantizers.ldlq import Feedback, round_with_feedback
from .base import FactorForm, Factors
from .pivoting import others_of, pivoted, pivoted_left

_DAMPING = 0.01
_ROUNDS = 2  # in rotated coordinates further ones gain under 1 %
_PIVOTED_ROUNDS = 4  # two more than for L and R gain 1 to 3 %


def round_factors(
    target: Tensor,  # A (out, in) float64
    gram: Tensor | None,  # H (in, in); None: the identity
    factors: Factors,  # float64, most important component first
    form: FactorForm,
    rows: Tensor | None = None,  # (out,): the error's rows are weighted by these
    rounds: int | None = None,
) -> Factors:
    """The factors as they will be stored, with their parts; `bias_shift` is passed on."""
    h = torch.eye(target.shape[1], dtype=target.dtype, device=target.device) if gram is None else gram
    return refine(target, h, factors, form, factor_feedback(form, h), rows, rounds)


def refine(
    target: Tensor,
    gram: Tensor,
    factors: Factors,
    form: FactorForm,
    feedback: Feedback,  # factor_feedback(form, gram), which CALDERA computes once
    rows: Tensor | None = None,
    rounds: int | None = None,
    reach: Tensor | None = None,  # A H (out, in), where the caller has it
) -> Factors:
    """`round_factors` with a prepared feedback."""
    top = None
    left, right = factors.left, factors.right
    reach = target @ gram if reach is None else reach
    if form.top:
        top = _nearest(left[:, : form.top], right[: form.top], form.top_form)
        left, right = left[:, form.top :], right[form.top :]
        target, reach = target - top.left @ top.right, reach - top.left @ (top.right @ gram)
    scale = torch.ones(len(target), 1, dtype=target.dtype) if rows is None else rows[:, None]
    scale = scale.to(target.device)
    pivots = others = None  # rows of L that are the identity's, and those that are rounded
    if form.pivoted and left.shape[1] < len(target):  # with as many components as outputs there is no C
        pivots, rest, right = pivoted(left, right)
        left, others = pivoted_left(rest, pivots), others_of(pivots, len(target))
    whole = float((scale * scale * target * reach).sum())
    best: tuple[float, Factors] | None = None
    if rounds is None:
        rounds = _ROUNDS if pivots is None else _PIVOTED_ROUNDS
    for step in range(max(rounds, 1)):
        if step:
            weighted = scale * scale * left
            right = solve_psd(weighted.T @ left, weighted.T @ target)
        right_parts, right = round_with_feedback(form.quantizer, right, feedback)
        inner, wanted = right @ gram @ right.T, right @ reach.T
        left = solve_psd(inner, wanted if others is None else wanted[:, others]).T
        left_parts, left = round_with_feedback(form.quantizer, left, _feedback(form.quantizer, inner))
        if pivots is not None:
            left = pivoted_left(left, pivots)
        energy = energy_left(whole, scale * left, scale * wanted.T, inner)
        if best is None or energy < best[0]:
            best = (energy, Factors(left, right, factors.bias_shift, left_parts, right_parts, top, pivots))
    assert best is not None
    return best[1]


def energy_left(
    whole: float,  # tr(A H A^T)
    left: Tensor,  # L (out, rank)
    wanted: Tensor,  # A H R^T (out, rank)
    inner: Tensor,  # R H R^T (rank, rank)
) -> float:
    """tr((A - L R) H (A - L R)^T), without a product with H. Its rounding error is that of tr(A H A^T) in float64."""
    return whole - 2 * float((left * wanted).sum()) + float((left.T @ left * inner).sum())


def factor_feedback(form: FactorForm, gram: Tensor) -> Feedback:
    """For the rows of R."""
    return _feedback(form.quantizer, gram)


def _feedback(quantizer: Quantizer, gram: Tensor) -> Feedback:
    return Feedback.of(quantizer.turned_gram(gram), _DAMPING, quantizer.block)


def plainly_rounded(factors: Factors, form: FactorForm) -> Factors:
    """The factors rounded to the nearest, without a target to fit."""
    top = _nearest(factors.left[:, : form.top], factors.right[: form.top], form.top_form) if form.top else None
    rest = _nearest(factors.left[:, form.top :], factors.right[form.top :], form.quantizer)
    return replace(rest, bias_shift=factors.bias_shift, top=top)


def _nearest(left: Tensor, right: Tensor, form: Quantizer | torch.dtype) -> Factors:
    if isinstance(form, torch.dtype):
        return Factors(left.to(form).double(), right.to(form).double())
    stored = []
    for matrix in (left, right):
        parts = form.quantize(matrix)
        stored.append((parts, form.dequantize(parts, (matrix.shape[0], matrix.shape[1]), torch.float64)))
    (left_parts, left), (right_parts, right) = stored
    return Factors(left, right, None, left_parts, right_parts)
