"""The contract of an allocator."""

from __future__ import annotations

from typing import ClassVar, Protocol

from .budget import LayerSpectrum


class Allocator(Protocol):
    """Spectra and a budget in, a rank per layer out; None leaves the layer dense."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # of: "spectra", "loss_weights"

    def allocate(self, layers: dict[str, LayerSpectrum], kept_fraction: float) -> dict[str, int | None]: ...
