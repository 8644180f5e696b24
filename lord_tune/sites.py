"""Sites: the places of a model where a weight matrix can be decomposed.

A site is what a structure says of one matrix before any weight is read: its name, shape and kind. The engine, the
budgets and the plan know sites only. What a site is made of stays here: a linear layer, a Conv1D (whose weight is
stored transposed), or one expert of a mixture, which layers/experts.py turns into a linear layer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import FactoredLinear, bias_of, is_transposed, shape_of, weight_of


@dataclass(frozen=True)
class Site:
    """One matrix W (out, in) of a model."""

    name: str  # module path
    shape: tuple[int, int]  # (out, in)
    dtype: torch.dtype
    bias: bool
    conv1d: bool  # the weight is stored as (in, out)
    block: int = 0  # the number of its block; in a model without blocks its own

    @classmethod
    def of(cls, name: str, module: nn.Module, block: int = 0) -> Site:
        dtype = weight_of(module).dtype
        return cls(name, shape_of(module), dtype, bias_of(module) is not None, is_transposed(module), block)

    @property
    def numbers(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def dense_bytes(self) -> int:
        """Of the weight as it is."""
        return self.numbers * self.dtype.itemsize

    def module(self, model: nn.Module) -> nn.Module:
        """The module that is there now."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """W, (out, in)."""
        return weight_of(self.module(model))

    def install(self, model: nn.Module, layer: FactoredLinear) -> nn.Module:
        """Put the decomposed layer in place of the dense one, which is returned."""
        dense = self.module(model)
        model.set_submodule(self.name, layer)
        return dense
