"""README.md of the folders that are written, as the Hub reads it: what it is, how good, how to load, how it was made.

One file per artefact: decomposed.py, trained.py, exported.py; base.py has what they share, scores.py puts what is
measured later into a card that is there.
"""

from .base import lineage_of
from .decomposed import decomposition_card
from .exported import export_card
from .scores import write_measured
from .trained import training_card

__all__ = ["decomposition_card", "export_card", "lineage_of", "training_card", "write_measured"]
