"""The same share of its cost for every layer, rounded down to one of its choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .base import Choices


@dataclass(frozen=True)
class Uniform:
    """A layer without a choice that is small enough stays dense, or is given its cheapest."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[frozenset[str]] = frozenset()

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        share = budget / max(sum(layer.dense for layer in layers.values()), 1)
        chosen = {}
        for name, layer in layers.items():
            fits = layer.within(share * layer.dense)
            chosen[name] = _dense(layer) if fits is None else fits
        return chosen


def _dense(layer: Choices) -> int:
    """The choice that leaves the layer as it is, or the nearest to it."""
    return int((layer.costs - layer.dense).abs().argmin())
