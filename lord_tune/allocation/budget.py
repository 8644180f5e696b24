"""What a rank costs, for each form of storing factors."""

from __future__ import annotations

from bisect import bisect_right

from ..declared import PLAIN

ALIGNMENT = 8  # ranks are multiples of this: tensor cores and SIMD rows want it


def factor_cost(shape: tuple[int, int], rank: int, form: str = PLAIN) -> int:
    """Numbers that the factors of an (m, n) layer hold: r (m + n) in L and R, or r (m + n - r) in C and B, and the r
    indices of B's rows (factorizations/pivoting.py)."""
    m, n = shape
    return rank * (m + n) if form == PLAIN else rank * (m + n - rank + 1)


def rank_within(shape: tuple[int, int], numbers: float, form: str = PLAIN) -> int:
    """The largest rank whose factors hold at most so many numbers."""
    return bisect_right(range(min(shape) + 1), numbers, key=lambda rank: factor_cost(shape, rank, form)) - 1


def break_even(shape: tuple[int, int], form: str = PLAIN) -> int:
    """The largest rank whose factors hold fewer numbers than the dense m n."""
    return rank_within(shape, shape[0] * shape[1] - 1, form)


def rank_grid(shape: tuple[int, int], alignment: int = ALIGNMENT, form: str = PLAIN) -> list[int]:
    """The admissible ranks of a layer: multiples of `alignment` up to break-even (possibly none)."""
    return list(range(alignment, break_even(shape, form) + 1, alignment))
