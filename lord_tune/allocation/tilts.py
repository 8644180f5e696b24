"""Small changes of what the choices are predicted to cost, for candidates around an allocator's solution.

Predictions add layers up and are of second order. What they get wrong as a whole (early blocks, one role, ranks close
to nothing) shows in whole models only: each tilt gives another plan of the same size, and held-out text decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .base import Choices
from .roles import DOWN, FUSED, GATE, OUTPUT, QUERY_KEY, UP, VALUE


@dataclass(frozen=True)
class Tilt:
    """One change."""

    name: str
    floor: float = 0.0  # of a layer's dense cost: no choice below it, where the layer has others
    slope: float = 0.0  # losses of the last block grow by exp(slope), those of the first shrink by it
    power: float = 1.0  # of the losses: below 1, differences count less
    role: str | None = None  # whose losses grow
    factor: float = 1.0

    def __call__(self, layers: Mapping[str, Choices]) -> dict[str, Choices]:
        return {name: self._of(layer) for name, layer in layers.items()}

    def _of(self, layer: Choices) -> Choices:
        if layer.losses is None:
            return layer
        losses = layer.losses**self.power * math.exp(self.slope * (2 * layer.depth - 1))
        if layer.role == self.role:
            losses = losses * self.factor
        above = layer.costs >= self.floor * layer.dense
        return replace(layer, losses=torch.where(above, losses, float("inf")))


TILTS = (
    Tilt("floor 0.25", floor=0.25),
    Tilt("early blocks", slope=-0.5),
    Tilt("late blocks", slope=0.5),
    Tilt("power 0.8", power=0.8),
    Tilt("floor 0.4", floor=0.4),
    *(Tilt(f"{role} x 2", role=role, factor=2.0) for role in (DOWN, OUTPUT, VALUE, FUSED, UP, GATE, QUERY_KEY)),
    *(Tilt(f"{role} x 0.5", role=role, factor=0.5) for role in (DOWN, OUTPUT, VALUE, FUSED, UP, GATE, QUERY_KEY)),
    Tilt("power 0.6", power=0.6),
    Tilt("early blocks, strongly", slope=-1.0),
    Tilt("late blocks, strongly", slope=1.0),
)
