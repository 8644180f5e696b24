"""Rank allocation, one rule per file; `ALLOCATORS` lists them by name."""

from typing import Any

from ..declared import FORMS, PIVOTED, PLAIN
from .base import Allocator
from .budget import ALIGNMENT, LayerSpectrum, break_even, factor_cost, rank_grid, rank_within
from .loss_weighted import LossWeighted
from .uniform import Uniform

ALLOCATORS: dict[str, type[Any]] = {"uniform": Uniform, "loss_weighted": LossWeighted}

__all__ = [
    "ALIGNMENT",
    "ALLOCATORS",
    "FORMS",
    "PIVOTED",
    "PLAIN",
    "Allocator",
    "LayerSpectrum",
    "LossWeighted",
    "Uniform",
    "break_even",
    "factor_cost",
    "rank_grid",
    "rank_within",
]
