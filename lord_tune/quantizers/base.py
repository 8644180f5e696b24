"""The contract of a quantizer: a weight in, a packed record out, and the exact tensor the record stands for.

A quantizer is a frozen dataclass of its hyperparameters. It sees tensors, never a model. `quantize` returns the parts
that are stored; `dequantize` of these parts is the backbone Q, exactly: factorizations work on W - dequantize(parts),
and a reload decodes the same bytes, so what was compensated is what is there.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Quantizer(Protocol):
    """Packed storage of a matrix in few bits."""

    name: ClassVar[str]

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:  # weight (out, in)
        """The stored parts; `weight` holds the packed codes, the others are named by the format."""
        ...

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Q, (out, in)."""
        ...

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        """Parts of the right shapes and dtypes with undefined content (meta device included)."""
        ...

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """x Q^T with a gradient to x, (..., in) -> (..., out)."""
        ...

    def options(self) -> dict[str, int | bool]:
        """The hyperparameters, as the manifest stores them."""
        ...
