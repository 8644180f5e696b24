"""Decompose a checkpoint: engine.py drives, layerwise.py does one layer, journal.py makes it resumable."""

from ..calibration.task import Task
from .base import BlockRecovery, LayerRecord, Notify, Progress, Settings, Source, Windows
from .budget import check_budget, fit_format, known_ranks
from .engine import Outcome, decompose_checkpoint
from .estimate import Estimate, estimate_run
from .journal import Journal
from .survey import Survey, survey
from .timing import Rates, TextSize, trace

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
    "check_budget",
    "decompose_checkpoint",
    "estimate_run",
    "fit_format",
    "known_ranks",
    "survey",
    "trace",
]
