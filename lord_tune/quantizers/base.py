"""The contract of a quantizer: a weight in, a packed record out, and the exact tensor the record stands for.

A quantizer is a frozen dataclass of its hyperparameters. It sees tensors, never a model. `quantize` returns the parts
that are stored; `dequantize` of these parts is the backbone Q, exactly: factorizations work on W - dequantize(parts),
and a reload decodes the same bytes, so what was compensated is what is there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

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

    def rounder(self, weight: Tensor, stretch: float = 1.0) -> Any:
        """A ldlq.Rounder in the scales of `weight` (out, in) times `stretch`."""
        ...

    def options(self) -> dict[str, int | bool]:
        """The hyperparameters, as the manifest stores them."""
        ...


class _DecodedLinear(torch.autograd.Function):
    """x Q^T that decodes Q in the forward and again in the backward pass: what is saved are the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, shape: tuple[int, int], names: list[str], *values: Tensor):
        ctx.quantizer, ctx.shape, ctx.names = quantizer, shape, names
        ctx.save_for_backward(*values)
        q = quantizer.dequantize(dict(zip(names, values, strict=True)), shape, x.dtype)
        return torch.nn.functional.linear(x, q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        q = ctx.quantizer.dequantize(parts, ctx.shape, gradients[0].dtype)
        return (gradients[0] @ q, None, None, None, *(None for _ in parts))


def decoded_linear(x: Tensor, quantizer: Quantizer, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The `linear` of any format, by decoding the whole matrix. (..., in) -> (..., out)"""
    return _DecodedLinear.apply(x, quantizer, shape, list(parts), *parts.values())
