"""Decompose a checkpoint: engine.py drives, layerwise.py does one layer, journal.py makes it resumable."""

from .base import BlockRecovery, LayerRecord, Notify, Progress, Settings, Source, Task, Windows
from .engine import Outcome, Survey, decompose_checkpoint, fit_format, known_ranks, survey
from .estimate import Estimate, Rates, TextSize, estimate, trace
from .journal import Journal

__all__ = [
    "BlockRecovery",
    "Estimate",
    "Journal",
    "LayerRecord",
    "Notify",
    "Outcome",
    "Progress",
    "Rates",
    "Settings",
    "Source",
    "Survey",
    "Task",
    "TextSize",
    "Windows",
    "decompose_checkpoint",
    "estimate",
    "fit_format",
    "known_ranks",
    "survey",
    "trace",
]
