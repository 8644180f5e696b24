"""The choices that cost the model's loss least, with the option to leave a layer dense.

The loss that a choice costs is predicted to second order, from how far it moves the layer's outputs and how much the
loss notices that (calibration/sensitivity.py); predictions of different layers add up. The dense option matters: large
ranks buy little, and good solutions leave many layers dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .base import Choices
from .lagrangian import solve


@dataclass(frozen=True)
class LossWeighted:
    """min sum of predicted loss increases subject to the budget."""

    name: ClassVar[str] = "loss_weighted"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra", "loss_weights"})

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        losses = {}
        for name, layer in layers.items():
            assert layer.losses is not None, "the driver measures what `needs` names"
            losses[name] = layer.losses
        return solve(layers, losses, budget)
