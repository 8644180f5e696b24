"""What a rank costs. The only place with m n / (m + n)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

ALIGNMENT = 8  # ranks are multiples of this: tensor cores and SIMD rows want it


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank whose factors r (m + n) hold fewer numbers than the dense m n."""
    m, n = shape
    return (m * n - 1) // (m + n)


def factor_cost(shape: tuple[int, int], rank: int) -> int:
    """Numbers in L and R."""
    return rank * sum(shape)


def rank_grid(shape: tuple[int, int], alignment: int = ALIGNMENT) -> list[int]:
    """The admissible ranks of a layer: multiples of `alignment` below break-even (possibly none)."""
    return list(range(alignment, break_even(shape) + 1, alignment))


@dataclass(frozen=True)
class LayerSpectrum:
    """What an allocator knows of a layer."""

    shape: tuple[int, int]
    energies: Tensor  # (k,) float64, squared output error per dropped direction, decreasing
    loss_weights: Tensor | None = None  # (k,) float64, u_j^T G u_j

    def costs_and_errors(self, alignment: int) -> tuple[Tensor, Tensor]:
        """Cost and predicted error of each admissible rank and, last, of staying dense. Both (choices,) float64."""
        weighted = self.energies if self.loss_weights is None else self.energies * self.loss_weights
        tail = torch.cat([weighted.flip(0).cumsum(0).flip(0), weighted.new_zeros(1)])  # tail[r] = sum over j >= r
        ranks = rank_grid(self.shape, alignment)
        m, n = self.shape
        costs = torch.tensor([*(factor_cost(self.shape, r) for r in ranks), m * n], dtype=torch.float64)
        errors = torch.cat([tail[torch.tensor(ranks, dtype=torch.long)], tail.new_zeros(1)])
        return costs, errors.cpu()


def check_fraction(kept_fraction: float) -> None:
    """UsageError unless 0 < kept_fraction < 1."""
    if not 0 < kept_fraction < 1:
        raise UsageError(
            f"Got `kept_fraction` {kept_fraction}; expected a number between 0 and 1, the fraction of the linear "
            "layers' parameters to keep (0.9 removes 10 %)."
        )
