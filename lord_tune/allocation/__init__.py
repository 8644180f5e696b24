"""Allocation, one rule per file; `ALLOCATORS` lists them by name."""

from typing import Any

from ..declared import FORMS, PIVOTED, PLAIN
from .base import Allocator, Choices, Infeasible
from .bolaco import Bolaco, Score, Search, Shares, Trial
from .budget import ALIGNMENT, break_even, factor_cost, rank_grid, rank_within
from .energy import Energy
from .loss_weighted import LossWeighted
from .mixed import Mixed
from .roles import role_of
from .spread import Spread
from .tilts import TILTS, Tilt
from .typed import Typed
from .uniform import Uniform

ALLOCATORS: dict[str, type[Any]] = {
    "uniform": Uniform,
    "loss_weighted": LossWeighted,
    "mixed": Mixed,
    "energy": Energy,
    "typed": Typed,
    "bolaco": Bolaco,
    "spread": Spread,
}

__all__ = [
    "ALIGNMENT",
    "ALLOCATORS",
    "FORMS",
    "PIVOTED",
    "PLAIN",
    "TILTS",
    "Allocator",
    "Bolaco",
    "Choices",
    "Infeasible",
    "LossWeighted",
    "Score",
    "Search",
    "Shares",
    "Tilt",
    "Trial",
    "Uniform",
    "break_even",
    "factor_cost",
    "rank_grid",
    "rank_within",
    "role_of",
]
