"""What a rank costs, for each form of storing factors."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from ..declared import PLAIN
from ..errors import UsageError

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


@dataclass(frozen=True)
class LayerSpectrum:
    """What an allocator knows of a layer."""

    shape: tuple[int, int]
    energies: Tensor  # (k,) float64, squared output error per dropped direction, decreasing
    loss_weights: Tensor | None = None  # (k,) float64, u_j^T G u_j
    form: str = PLAIN  # of storing its factors

    def costs_and_errors(self, alignment: int) -> tuple[Tensor, Tensor]:
        """Cost and predicted error of each admissible rank and, last, of staying dense. Both (choices,) float64."""
        weighted = self.energies if self.loss_weights is None else self.energies * self.loss_weights
        tail = torch.cat([weighted.flip(0).cumsum(0).flip(0), weighted.new_zeros(1)])  # tail[r] = sum over j >= r
        ranks = rank_grid(self.shape, alignment, self.form)
        m, n = self.shape
        costs = torch.tensor([*(factor_cost(self.shape, r, self.form) for r in ranks), m * n], dtype=torch.float64)
        errors = torch.cat([tail[torch.tensor(ranks, dtype=torch.long)], tail.new_zeros(1)])
        return costs, errors.cpu()


def check_fraction(kept_fraction: float) -> None:
    """UsageError unless 0 < kept_fraction < 1."""
    if not 0 < kept_fraction < 1:
        raise UsageError(
            f"Got `kept_fraction` {kept_fraction}; expected a number between 0 and 1, the fraction of the linear "
            "layers' parameters to keep (0.9 removes 10 %)."
        )
