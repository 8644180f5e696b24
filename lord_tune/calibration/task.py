"""How a kind of model is run, told to the calibration by whoever knows its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# whose logarithms `scored` takes at once, where nothing is differentiated
LOGIT_ROWS = 32


@dataclass(frozen=True)
class Task:
    """How this kind of model is run; supplied by integrations, so that nothing here knows a model class."""

    forward: Callable[[nn.Module, Tensor], object]  # (model, (1, length) ids)
    loss: Callable[[nn.Module, Tensor], Tensor]  # the same -> scalar, summed over tokens
    outputs: Callable[[object], list[Tensor]]  # what counts of that which `forward` returns
    prepare: Callable[[Tensor], Tensor] = lambda ids: ids  # (1, length) -> the ids that `loss` runs the model on
    # the same as `loss`, with the number of tokens it is the sum of; None for a model whose loss on text means nothing
    scored: Callable[[nn.Module, Tensor], tuple[Tensor, int]] | None = None
    # what it is computed from: float32 logits (tokens, vocabulary) and the tokens (tokens,) that they should predict
    predicted: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
