"""One threshold for all layers: each takes the cheapest choice whose relative output error is below it.

A simple baseline (the energy rule of many SVD papers): scales of layers are comparable, but not how much the loss
notices an error, so flat spectra take the budget. The threshold is found by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Choices, check_budget


@dataclass(frozen=True)
class Energy:
    """The smallest common relative error that meets the budget."""

    name: ClassVar[str] = "energy"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra"})

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        check_budget(layers, budget)

        def choose(threshold: float) -> dict[str, int]:
            return {name: _cheapest_below(layer, threshold) for name, layer in layers.items()}

        def fits(choice: dict[str, int]) -> bool:
            return sum(float(layers[name].costs[index]) for name, index in choice.items()) <= budget

        thresholds = torch.cat([_errors(layer) for layer in layers.values()]).unique()  # sorted
        low, high = 0, len(thresholds)  # the least that fits is in [low, high); `high` itself: the cheapest choices
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(choose(float(thresholds[middle]))) else (middle + 1, high)
        if low == len(thresholds):
            return {name: layer.cheapest() for name, layer in layers.items()}
        return choose(float(thresholds[low]))


def _errors(layer: Choices) -> torch.Tensor:
    assert layer.errors is not None, "the driver measures what `needs` names"
    return layer.errors


def _cheapest_below(layer: Choices, threshold: float) -> int:
    """Of the choices with at most this error; the most exact one where none has."""
    errors = _errors(layer)
    fits = errors <= max(threshold, float(errors.min()))
    return int(torch.where(fits, layer.costs, float("inf")).argmin())
