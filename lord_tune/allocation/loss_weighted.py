"""Ranks that cost the model's loss least: a Lagrangian over all layers, with the option to leave a layer dense.

Each layer k offers choices (cost, error): the aligned ranks below break-even, error sum over j >= r of
sigma_j^2 u_j^T G u_j (the K-FAC/Fisher estimate of the loss increase, calibration/sensitivity.py), and staying dense at
cost m n, error 0. For a price lambda every layer picks argmin error + lambda cost; bisection finds the smallest price
that meets the budget (Shoham and Gersho 1988, the classical bit-allocation argument: exact on the lower convex hull).
What the hull leaves of the budget is then spent greedily on the upgrades with the best error per parameter.
The dense option matters: ranks near break-even buy nothing, and good solutions leave over half of the layers dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from .budget import ALIGNMENT, LayerSpectrum, check_fraction, rank_grid


@dataclass(frozen=True)
class LossWeighted:
    """min sum of predicted loss increases subject to the parameter budget."""

    name: ClassVar[str] = "loss_weighted"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra", "loss_weights"})
    alignment: int = ALIGNMENT

    def allocate(self, layers: dict[str, LayerSpectrum], kept_fraction: float) -> dict[str, int | None]:
        check_fraction(kept_fraction)
        tables = {name: layer.costs_and_errors(self.alignment) for name, layer in layers.items()}
        budget = kept_fraction * sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        cheapest = sum(float(costs.min()) for costs, _ in tables.values())
        if cheapest > budget:
            raise UsageError(
                f"`kept_fraction` {kept_fraction} cannot be met: rank {self.alignment} everywhere already keeps "
                f"{cheapest / budget * kept_fraction:.3f} of the parameters. Keep more, or decompose more layers."
            )
        choice = _spend_rest(tables, _cheapest_price(tables, budget), budget)
        ranks: dict[str, int | None] = {}
        for name, layer in layers.items():
            grid = rank_grid(layer.shape, self.alignment, layer.form)
            ranks[name] = grid[choice[name]] if choice[name] < len(grid) else None
        return ranks


def _cheapest_price(tables: dict[str, tuple[Tensor, Tensor]], budget: float) -> dict[str, int]:
    """The choices at the smallest price that meets the budget, by bisection on log(price)."""

    def choose(price: float) -> dict[str, int]:
        return {name: int((errors + price * costs).argmin()) for name, (costs, errors) in tables.items()}

    def spent(choice: dict[str, int]) -> float:
        return sum(float(tables[name][0][index]) for name, index in choice.items())

    scale = max((float(e.max() / c.min()) for c, e in tables.values()), default=1.0) or 1.0
    low, high = scale * 1e-18, scale * 1e6
    if spent(choose(low)) <= budget:
        return choose(low)
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if spent(choose(middle)) <= budget else (middle, high)
    choice = choose(high)
    # an all-zero error table never reacts to the price; its layers take their cheapest choice
    return choice if spent(choice) <= budget else {name: int(costs.argmin()) for name, (costs, _) in tables.items()}


def _spend_rest(tables: dict[str, tuple[Tensor, Tensor]], choice: dict[str, int], budget: float) -> dict[str, int]:
    """Take single-layer upgrades of the best error decrease per parameter while they fit."""
    choice = dict(choice)
    left = budget - sum(float(tables[name][0][index]) for name, index in choice.items())
    while True:
        best: tuple[float, str, int] | None = None
        for name, (costs, errors) in tables.items():
            extra = costs - costs[choice[name]]
            gain = errors[choice[name]] - errors
            fits = (extra > 0) & (extra <= left) & (gain > 0)
            if not bool(fits.any()):
                continue
            rate = torch.where(fits, gain / extra.clamp_min(1), torch.full_like(gain, -1.0))
            index = int(rate.argmax())
            if best is None or float(rate[index]) > best[0]:
                best = (float(rate[index]), name, index)
        if best is None:
            return choice
        left -= float(tables[best[1]][0][best[2]] - tables[best[1]][0][choice[best[1]]])
        choice[best[1]] = best[2]
