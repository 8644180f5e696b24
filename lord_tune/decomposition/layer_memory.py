"""Memory of the layer at hand, in float64 matrices that live together.

m = out in, k = min(out, in), f = rank (out + in):

    solution     (wide: out <= in) W, then rows of its curves, 2.5 m + 6 k^2;  (tall) rotation and basis, 2 m + 8.5 k^2;
                 with output weights their moment, its root, the dual and products of the curves, out^2 + 4 k^2 more and
                 (tall) m; where they foresee noise H_g, in^2
    truncation   2 m + f, tall 3 m + f, while the solution is alive; pivoted factors: LU of L, where it is larger than B
    backbone     Q, W, W - Q and, for the error of a plain SVD beside them, two differences and one times H:
                 wide max(7 m, 5 m + 6 k^2), tall max(6 m + 7 k^2, 7 m + 4 k^2); one more Q with --shrinkage auto;
                 before, while Q is rounded with feedback, 1.5 m, four float32 matrices of the candidates side by side
                 (3 W, at most 2^24 weights), H rotated and as a root in the making, and a float32 root per damping
    caldera      W, Q, residuals and products of two iterates, 10 m + f, and five Gram matrices (rotated, down-dated,
                 two roots, one of them single and its diagonal)

glibc gives matrices of more than 32 MiB back to the system when they are freed. Smaller ones stay with the process, in
pieces that larger requests do not fit in: the largest sum of such matrices over the layers (`together`) is added.
"""

from __future__ import annotations

from ..allocation import PIVOTED
from ..plans import LayerChoice
from ..quantizers.ldlq import DAMPINGS, STACKED, STRETCHES
from .judging import COMPARED_INPUTS
from .timing import TextSize, rounds_with_feedback

MAPPED = 32 << 20  # glibc's largest DEFAULT_MMAP_THRESHOLD: freed blocks below it stay with the process
Parts = list[tuple[float, int]]  # (how many, bytes of one)


def together(layers: list[Parts], limit: int) -> int:
    """The largest sum of the mapped blocks of a layer, and of the retained ones (below `limit`) of any."""
    mapped = max((sum(n * size for n, size in parts if size >= limit) for parts in layers), default=0)
    retained = max((sum(n * size for n, size in parts if size < limit) for parts in layers), default=0)
    return int(mapped + retained)


def truncation_parts(shape: tuple[int, int], rank: int, form: str) -> Parts:
    """Of cutting the factors from a stored basis."""
    out, inputs = shape
    return [(1.0, 8 * out * inputs), (2.0, 8 * rank * (out + inputs)), (1.0, _pivoting_bytes(shape, rank, form))]


def _pivoting_bytes(shape: tuple[int, int], rank: int, form: str) -> int:
    """What LU and C (2 out rank + rank^2) take beyond the balanced L and R of plain factors."""
    out, inputs = shape
    return 8 * rank * max(0, out + rank - inputs) if form == PIVOTED else 0


def working_parts(
    shape: tuple[int, int], rank: int, text: TextSize | None, choice: LayerChoice, predicts: bool
) -> Parts:
    """Float64 matrices that live together while one layer is factorized; see the top."""
    out, inputs = shape
    k, tall = min(shape), out > inputs
    m, square = 8 * out * inputs, 8 * k * k
    alternation: Parts = [(10.0, m), (5.0, 8 * inputs * inputs), (2.0, 8 * rank * (out + inputs))]
    method, backbone = choice.factorization(), choice.backbone != "none"
    if method.alternates:
        return alternation
    weighed: Parts = []
    if "output_gram" in method.needs:
        weighed = [
            (1.0, 8 * out * out),
            (4.0, square),
            (1.0 if tall else 0.0, m),
            (float(predicts), 8 * inputs * inputs),
        ]
    if backbone and text is not None:
        choices = [(6.0, 7.0), (7.0, 4.0)] if tall else [(7.0, 0.0), (5.0, 6.0)]
        extra = 1.0 if len(method.candidates()) > 1 else 0.0
        whole, squares = _larger(choices, m, square)
        own: Parts = [(whole + extra, m), (squares, square), *weighed]
        if rounds_with_feedback(choice):
            stacked = min(len(STRETCHES) * out * inputs, STACKED)
            rounded: Parts = [(1.5, m), (1.0, 16 * stacked), (len(DAMPINGS), 4 * inputs**2), (3.0, 8 * inputs**2)]
            own = max(own, rounded, key=_bytes)
        compared = rank > 0 and inputs <= COMPARED_INPUTS  # with feedback rounding alone
        alone: Parts = [(5.0, m), *alternation[1:]]  # one iterate: W twice, Q, what it leaves, and their products
        return max(own, alone if compared else own, key=_bytes)
    above = 2.0 if backbone else 0.0  # W and Q beside the residual's solution
    if text is None:
        choices = [(2.0, 7.0)] if tall else [(1.0, 6.0)]
        return [(above + choices[0][0], m), (choices[0][1], square)]
    return _solution_parts(shape, rank, text, choice.form) + weighed


def _solution_parts(shape: tuple[int, int], rank: int, text: TextSize, form: str) -> Parts:
    """Without a backbone, the larger of the solution with its curves and of the truncation."""
    out, inputs = shape
    k, tall = min(shape), out > inputs
    m, square = 8 * out * inputs, 8 * k * k
    rows_only = text.heldout <= 2 * inputs  # else a Gram matrix and two products with it
    measured = 2 * 8 * text.heldout * k if rows_only else 0
    choices = [(2.0, 8.5)] if tall else [(2.5 if rows_only else 4.0, 6.0)]
    parts = [(choices[0][0], m), (choices[0][1], square), (1.0, measured)]
    pivoting = 8 * rank * (out + inputs) + _pivoting_bytes(shape, rank, form) if form == PIVOTED else 0
    cut = [((3.0 if tall else 2.0), m), (3.0, square), (1.0, 8 * rank * (out + inputs)), (1.0, pivoting)]
    return max(parts, cut, key=_bytes)


def _bytes(parts: Parts) -> float:
    return sum(n * size for n, size in parts)


def _larger(choices: list[tuple[float, float]], m: int, square: int) -> tuple[float, float]:
    return max(choices, key=lambda choice: choice[0] * m + choice[1] * square)
