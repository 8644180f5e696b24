"""Recovery of a decomposed model: its factors, or LoRA on them, are trained with trl."""

from .arguments import LEARNING_RATES, TrainOptions, load_yaml, trainer_arguments
from .data import prepare_rows, sample_spans
from .run import expose, train_model

__all__ = [
    "LEARNING_RATES",
    "TrainOptions",
    "expose",
    "load_yaml",
    "prepare_rows",
    "sample_spans",
    "train_model",
    "trainer_arguments",
]
