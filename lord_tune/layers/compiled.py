"""The product of a packed layer as one operation of torch.compile, which does not look inside.

Decoding is a few large kernels already, and it asks where tensors are and what has been cached, so tracing it would
break the graph in every layer. Exported graphs and eager runs go another way: they must not need lord_tune, or its
overhead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..quantizers import Quantizer, make_quantizer


def form_key(quantizer: Quantizer, names: Sequence[str]) -> str:
    """A format and the names of its stored parts, as a string: what an operation takes beside tensors."""
    return json.dumps([quantizer.name, quantizer.options(), list(names)])


@cache
def _form(key: str) -> tuple[Quantizer, list[str]]:
    name, options, names = json.loads(key)
    return make_quantizer(name, options), names


@torch.library.custom_op("lord_tune::packed_linear", mutates_args=())
def packed_linear(x: Tensor, values: Sequence[Tensor], form: str, out: int, inputs: int) -> Tensor:
    """x Q^T, (..., in) -> (..., out), of the stored parts `values`."""
    quantizer, names = _form(form)
    # an alias, since compiled code writes other values into a tensor and formats remember what they made of one
    with torch.autocast(x.device.type, enabled=False):
        return quantizer.linear(x.detach(), dict(zip(names, values, strict=True)), (out, inputs))


@torch.library.custom_op("lord_tune::packed_transposed", mutates_args=())
def packed_transposed(y: Tensor, values: Sequence[Tensor], form: str, out: int, inputs: int) -> Tensor:
    """y Q, (..., out) -> (..., in): the backward pass of `packed_linear`."""
    quantizer, names = _form(form)
    with torch.autocast(y.device.type, enabled=False):
        return quantizer.transposed(y.detach(), dict(zip(names, values, strict=True)), (out, inputs))


@packed_linear.register_fake
def _(x: Tensor, values: Sequence[Tensor], form: str, out: int, inputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@packed_transposed.register_fake
def _(y: Tensor, values: Sequence[Tensor], form: str, out: int, inputs: int) -> Tensor:
    return y.new_empty(*y.shape[:-1], inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, *ctx.rest = inputs
    ctx.save_for_backward(*values)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    values = list(ctx.saved_tensors)
    return packed_transposed(gradient, values, *ctx.rest), [None] * len(values), None, None, None


packed_linear.register_autograd(_backward, setup_context=_save)


def compiled_linear(x: Tensor, values: Sequence[Tensor], form: str, shape: tuple[int, int]) -> Tensor:
    """`Quantizer.linear` in a graph that is being compiled."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    product: Tensor = packed_linear(x, values, form, *shape)
    return product
