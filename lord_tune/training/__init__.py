"""Recovery of a decomposed model: its factors, or adapters on them, are trained with trl."""

from .arguments import LEARNING_RATES, TrainOptions, trainer_arguments
from .data import prepare_rows, sample_spans
from .forecast import MemoryEstimate, predict_memory
from .memory import Account, account
from .modes import expose
from .run import begun, train_model

__all__ = [
    "LEARNING_RATES",
    "Account",
    "MemoryEstimate",
    "TrainOptions",
    "account",
    "begun",
    "expose",
    "predict_memory",
    "prepare_rows",
    "sample_spans",
    "train_model",
    "trainer_arguments",
]
