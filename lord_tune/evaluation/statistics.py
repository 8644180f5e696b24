"""How sure a measured number is: standard errors of means over clusters, intervals of counts, pass@k.

Tokens of one window depend on each other, so a standard error over tokens would be too small. Windows are the units
here: with sums s_w and counts n_w of each, the mean is m = sum(s) / sum(n), and its standard error, from the linear
part of that ratio, is sqrt(W / (W - 1) * sum((s_w - m n_w)^2)) / sum(n). Windows of one document depend on each other
too, which this does not see: of a text of few long documents it is still too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_Z = 1.959963984540054  # of a normal interval of 95 %


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, and its standard error over the windows that they lie in."""

    value: float
    standard_error: float | None  # None where there is one window only


def clustered_mean(
    sums: Tensor,  # (window,)
    counts: Tensor,  # (window,)
) -> Mean:
    """See the top of this file; float64."""
    sums, counts = sums.double(), counts.double()
    total, windows = float(counts.sum()), len(sums)
    mean = float(sums.sum()) / total
    if windows < 2:
        return Mean(mean, None)
    squares = float((sums - mean * counts).square().sum())
    return Mean(mean, math.sqrt(windows / (windows - 1) * squares) / total)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % of a fraction: it stays within 0 and 1, and is of use with few trials, and with
    no success or nothing else, where successes +- 1.96 standard errors would be a point."""
    share, squared = successes / trials, _Z * _Z
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = _Z / (1 + squared / trials) * math.sqrt(share * (1 - share) / trials + squared / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples is correct, unbiased: 1 - C(n - c, k) / C(n, k), with n samples of one
    problem, c of them correct."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """An interval of 95 % of the mean of one value per problem, cut to 0 and 1: mean +- 1.96 standard errors."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return 0.0, 1.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _Z * math.sqrt(variance / len(values))
    return max(0.0, mean - half), min(1.0, mean + half)
