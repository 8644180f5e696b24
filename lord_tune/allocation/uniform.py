"""The same kept fraction for every layer, its rank rounded down to a multiple of 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .budget import ALIGNMENT, LayerSpectrum, check_fraction, rank_within


@dataclass(frozen=True)
class Uniform:
    """A layer too small for rank 8 below its break-even stays dense."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[frozenset[str]] = frozenset()
    alignment: int = ALIGNMENT

    def allocate(self, layers: dict[str, LayerSpectrum], kept_fraction: float) -> dict[str, int | None]:
        check_fraction(kept_fraction)
        ranks: dict[str, int | None] = {}
        for name, layer in layers.items():
            m, n = layer.shape
            rank = rank_within(layer.shape, kept_fraction * m * n, layer.form) // self.alignment * self.alignment
            ranks[name] = rank or None
        return ranks
