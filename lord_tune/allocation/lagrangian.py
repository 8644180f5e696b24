"""One choice per layer that costs least in sum and is within a budget: the Lagrangian, and a greedy rest.

For a price lambda every layer picks argmin loss + lambda cost; bisection finds the smallest price that meets the budget
(Shoham and Gersho 1988, the classical bit-allocation argument: exact on the lower convex hull of every layer's
choices). What the hull leaves of the budget is then spent on the upgrades with the best loss per cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Choices, check_budget


def solve(layers: Mapping[str, Choices], losses: Mapping[str, Tensor], budget: float) -> dict[str, int]:
    """min sum of `losses` subject to sum of costs <= budget: layer -> choice."""
    check_budget(layers, budget)
    if not layers:
        return {}
    costs = _stacked([layer.costs for layer in layers.values()])
    values = _stacked([losses[name] for name in layers])
    choice = _spend_rest(costs, values, _cheapest_price(costs, values, budget), budget)
    return dict(zip(layers, choice.tolist(), strict=True))


def _stacked(rows: list[Tensor]) -> Tensor:
    """(layers, choices), with infinities behind the choices of layers that have fewer."""
    table = torch.full((len(rows), max(len(row) for row in rows)), float("inf"), dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _at(table: Tensor, choice: Tensor) -> Tensor:
    """(layers,): the entry of each layer's choice."""
    return table.gather(1, choice[:, None])[:, 0]


def _cheapest_price(costs: Tensor, losses: Tensor, budget: float) -> Tensor:
    """(layers,) choices at the smallest price that meets the budget, by bisection on log(price)."""

    def choose(price: float) -> Tensor:
        return (losses + price * costs).argmin(1)

    def fits(choice: Tensor) -> bool:
        return float(_at(costs, choice).sum()) <= budget

    finite = losses.isfinite()
    largest = torch.where(finite, losses, -float("inf")).max(1).values
    scale = float((largest / costs.min(1).values.clamp_min(1e-300)).max()) or 1.0
    low, high = scale * 1e-18, scale * 1e6
    if fits(choose(low)):
        return choose(low)
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(choose(middle)) else (middle, high)
        if high <= low * (1 + 1e-15):
            break
    choice = choose(high)
    # a table of zeros never reacts to the price; its layers take their cheapest choice
    return choice if fits(choice) else costs.argmin(1)


def _spend_rest(costs: Tensor, losses: Tensor, choice: Tensor, budget: float) -> Tensor:
    """Take single-layer upgrades of the best decrease of the loss per cost while they fit."""
    choice = choice.clone()
    left = budget - float(_at(costs, choice).sum())
    extra = costs - _at(costs, choice)[:, None]
    gain = _at(losses, choice)[:, None] - losses
    while True:
        fits = (extra > 0) & (extra <= left) & (gain > 0)
        if not bool(fits.any()):
            return choice
        rate = torch.where(fits, gain / extra.clamp_min(1), -1.0)
        layer, index = divmod(int(rate.argmax()), costs.shape[1])
        left -= float(extra[layer, index])
        choice[layer] = index
        extra[layer] = costs[layer] - costs[layer, index]
        gain[layer] = losses[layer, index] - losses[layer]
