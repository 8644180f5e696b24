"""Decompose a checkpoint: decide.py plans, engine.py drives, layerwise.py does one layer, journal.py resumes."""

from ..calibration.task import Task
from .base import BlockRecovery, LayerRecord, Notify, Progress, Source, Windows
from .choices import Sized, Unit
from .decide import Bits, Budget, Given, Ranks, Request, Untouched
from .engine import CONTROL, SOLUTION, Compared, Outcome, decide_measured, decompose_checkpoint
from .estimate import Estimate, estimate_run
from .journal import Journal
from .steps import Phase, is_block
from .survey import Survey
from .timing import Rates, TextSize, trace

__all__ = [
    "CONTROL",
    "SOLUTION",
    "Bits",
    "BlockRecovery",
    "Budget",
    "Compared",
    "Estimate",
    "Given",
    "Journal",
    "LayerRecord",
    "Notify",
    "Outcome",
    "Phase",
    "Progress",
    "Ranks",
    "Rates",
    "Request",
    "Sized",
    "Source",
    "Survey",
    "Task",
    "TextSize",
    "Unit",
    "Untouched",
    "Windows",
    "decide_measured",
    "decompose_checkpoint",
    "estimate_run",
    "is_block",
    "trace",
]
