"""Fixed shares by role: values stay dense, queries, keys and attention outputs give most, MLPs the rest.

A baseline without any measurement: what searches over the ratios of layer types mostly find (Bolaco, Ji et al. 2024,
arXiv 2405.10616, section 4.4, on Llama-2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .base import Choices, check_budget
from .roles import FUSED, OUTPUT, QUERY_KEY, VALUE

_REMOVED = {VALUE: 0.0, QUERY_KEY: 2.5, OUTPUT: 2.5, FUSED: 1.5}  # relative to an MLP layer, 1.0


@dataclass(frozen=True)
class Typed:
    """The smallest common factor on the roles' removed shares that meets the budget."""

    name: ClassVar[str] = "typed"
    needs: ClassVar[frozenset[str]] = frozenset()

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        check_budget(layers, budget)

        def choose(factor: float) -> dict[str, int]:
            chosen = {}
            for name, layer in layers.items():
                weight = _REMOVED.get(layer.role, 1.0)
                # when everything else is at its cheapest, values give way as well
                removed = factor * weight + max(0.0, factor - 1.0)
                fits = layer.within((1.0 - removed) * layer.dense)
                chosen[name] = layer.cheapest() if fits is None else fits
            return chosen

        def fits(choice: dict[str, int]) -> bool:
            return sum(float(layers[name].costs[index]) for name, index in choice.items()) <= budget

        low, high = 0.0, 2.0  # at 2 every layer takes its cheapest choice
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(choose(middle)) else (middle, high)
        return choose(high)
