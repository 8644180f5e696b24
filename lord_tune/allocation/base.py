"""The contract of an allocator: every layer offers choices, a budget is given, one choice per layer comes back.

What a choice is (a rank, a format with a rank, staying dense) is not looked at here: allocators see costs and what each
choice is predicted to do. So one rule serves L R, Q alone and Q + L R, and budgets of numbers and of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Choices:
    """What may become of one layer: n choices in any order."""

    costs: Tensor  # (n,) float64, in the budget's unit
    dense: float  # what the layer costs as it is
    losses: Tensor | None = None  # (n,) float64: predicted increase of the loss, nats per token
    errors: Tensor | None = None  # (n,) float64: relative squared error of the layer's outputs
    role: str = "other"  # see roles.py
    depth: float = 0.5  # of its block in the model, 0 to 1
    block: int = 0  # the number of its block, in the order in which they run

    def cheapest(self) -> int:
        return int(self.costs.argmin())

    def within(self, limit: float) -> int | None:
        """The costliest choice that costs at most `limit`."""
        fits = self.costs <= limit + 1e-9
        return int(self.costs.masked_fill(~fits, -1.0).argmax()) if bool(fits.any()) else None


class Allocator(Protocol):
    """One choice per layer, by its number. UsageError where even the cheapest ones are above the budget."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # of: "spectra" (errors), "loss_weights" (losses)

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]: ...


def check_budget(layers: Mapping[str, Choices], budget: float) -> None:
    """UsageError, naming the smallest feasible budget, where none is."""
    least = sum(float(layer.costs.min()) for layer in layers.values())
    if least > budget:
        raise Infeasible(least, budget)


class Infeasible(UsageError):
    """No choice of every layer is within the budget."""

    def __init__(self, least: float, budget: float):
        super().__init__(f"The budget {budget:g} cannot be met: the cheapest choices cost {least:g}.")
        self.least, self.budget = least, budget
