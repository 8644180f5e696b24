"""Bits and ranks in one budget: every layer may be dense, low rank, or rounded to any of several formats with and
without L R, whatever costs the loss least.

The rule is that of loss_weighted; what is mixed is the choices (decomposition/choices.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .loss_weighted import LossWeighted


@dataclass(frozen=True)
class Mixed(LossWeighted):
    """min sum of predicted loss increases over all kinds of choices, subject to the budget."""

    name: ClassVar[str] = "mixed"
