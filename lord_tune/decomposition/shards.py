"""A block's tensors in memory, and the tensors of the shard it becomes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import check_finite
from ..memory import give_back
from .base import Source


class Loaded:
    """A block's tensors in memory for the length of a `with`; raises CheckpointError if one holds NaN or Inf."""

    def __init__(self, source: Source, names: list[str], model: nn.Module):
        self.source, self.names, self.model = source, names, model

    def __enter__(self) -> Loaded:
        self.source.load(self.names)
        check_finite(self.model)
        return self

    def __exit__(self, *rest: Any) -> None:
        self.source.release(self.names)
        give_back()


def to_meta(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        owner.register_parameter(name.rpartition(".")[2], empty)
