"""The integer grids that inference engines decode: GGUF's simple blocks (llama.cpp) and the weights of
compressed-tensors (vLLM).

A weight is scale * (code - zero), as in integer.py. What differs is which scales and zeros an engine can hold:

    q4_0 q5_0 q8_0   groups of 32, a float16 scale of either sign, zero 2^(bits-1)
    q2_0             the same in groups of 64: -2 to 1 times a scale of either sign is -1 to 2 times its negative
    q4_1 q5_1        groups of 32, a float16 scale and a float16 minimum: `int4` and its like
    w2a16 w4a16 ...  groups of any size, zero 2^(bits-1) or an integer per group. The scale is stored in the dtype of
                     the model there, so it has the 8 significant bits that float16, bfloat16 and float32 all hold: no
                     cast of the model changes it

A scale of either sign puts the code that has no counterpart, -2^(bits-1), where the group's largest weight is, so that
all 2^bits codes are used. At 2 bits the best scale is not the one that just reaches the largest weight, and is searched
for in each group.

Packed as the other scalar formats are; `gguf_blocks` gives the bytes of GGUF. What compressed-tensors calls a channel
is a group of at least as many weights as a row has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declared import Options, option
from ..errors import UsageError
from .base import stored_scales
from .grouped import divisor_of
from .integer import Int8, Integer
from .packing import unpack_values, word_table

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the scale that reaches the largest weight, at 2 bits


@dataclass(frozen=True)
class Block(Integer):
    """A block of GGUF, whose size is no choice."""

    group_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        kind = type(self)
        if (self.group_size, self.symmetric) != (kind.group_size, kind.symmetric):
            raise UsageError(
                f"Got groups of {self.group_size} weights{', symmetric' if self.symmetric else ''}, for {self.name}; "
                f"its blocks of {kind.group_size} are no choice. Leave `group_size` and `symmetric` out, or use int*."
            )

    def options(self) -> Options:
        return {}


@dataclass(frozen=True)
class _Signed(Block):
    """Symmetric codes with a scale of either sign."""

    symmetric: bool = True

    def group_scales(self, groups: Tensor, counts: Tensor) -> dict[str, Tensor]:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        whole = largest / -(2 ** (self.bits - 1))
        if self.bits > 2:
            return {"scales": _signed_half(whole)}
        inside = torch.arange(groups.shape[-1], device=groups.device) < counts[:, None]
        tried = [sign * share * whole for share in _SHARES for sign in (1, -1)]
        errors = []
        for scale in tried:
            _, decoded = self.round_with(groups, _signed_half(scale).float()[..., None], None)
            errors.append(((groups - decoded).square() * inside).sum(-1))
        least = torch.stack(errors).argmin(0)
        return {"scales": _signed_half(torch.stack(tried).gather(0, least[None]).squeeze(0))}


def _signed_half(scales: Tensor) -> Tensor:
    return torch.where(scales < 0, -stored_scales(scales.abs()), stored_scales(scales.abs()))


@dataclass(frozen=True)
class Q2_0(_Signed):
    """2.25 bits per weight."""

    name: ClassVar[str] = "q2_0"
    bits: ClassVar[int] = 2
    group_size: int = 64


class Q4_0(_Signed):
    """4.5 bits per weight."""

    name: ClassVar[str] = "q4_0"
    bits: ClassVar[int] = 4


class Q5_0(_Signed):
    """5.5 bits per weight."""

    name: ClassVar[str] = "q5_0"
    bits: ClassVar[int] = 5


class Q4_1(Block):
    """5 bits per weight."""

    name: ClassVar[str] = "q4_1"
    bits: ClassVar[int] = 4


class Q5_1(Block):
    """6 bits per weight."""

    name: ClassVar[str] = "q5_1"
    bits: ClassVar[int] = 5


@dataclass(frozen=True)
class Q8_0(Block, Int8):
    """8.5 bits per weight."""

    name: ClassVar[str] = "q8_0"
    symmetric: bool = True


@dataclass(frozen=True)
class Weights(Integer):
    """Weights of compressed-tensors' schemes."""

    group_size: int = option(128, "weights per scale", gt=0)
    symmetric: bool = option(True, "no zero point")

    def group_scales(self, groups: Tensor, counts: Tensor) -> dict[str, Tensor]:
        levels = 2**self.bits - 1
        if self.symmetric:
            return {"scales": _shared_half(groups.abs().amax(-1) / (levels / 2))}
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)  # 0 is a code; padding is 0
        scales = _shared_half((high - low) / levels)
        zeros = (-low / divisor_of(scales.float())).round().clamp(0, levels)
        return {"scales": scales, "zeros": zeros.to(torch.uint8)}

    def stretched(self, scales: dict[str, Tensor], stretch: Tensor | float) -> dict[str, Tensor]:
        return scales | {"scales": _shared_half(scales["scales"].float() * stretch)}

    def affine(self, scales: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        factor = scales["scales"].float()
        return factor, None if self.symmetric else -factor * scales["zeros"].float()  # exact, as is its sum: 17 bits

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        return {"scales": torch.float16} | ({} if self.symmetric else {"zeros": torch.uint8})


def _shared_half(scales: Tensor) -> Tensor:
    """Scales >= 0 in float16, of 8 significant bits."""
    return stored_scales(scales.bfloat16().float())


class W2A16(Weights):
    """2.125 bits per weight at groups of 128."""

    name: ClassVar[str] = "w2a16"
    bits: ClassVar[int] = 2


class W4A16(Weights):
    """4.125 bits per weight at groups of 128."""

    name: ClassVar[str] = "w4a16"
    bits: ClassVar[int] = 4


class W8A16(Weights):
    """8.125 bits per weight at groups of 128."""

    name: ClassVar[str] = "w8a16"
    bits: ClassVar[int] = 8


def signed_codes(form: Weights, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """(codes (out, in), zero points (out, groups) where there are any), int8: as compressed-tensors counts them."""
    table = word_table(torch.arange(2**form.bits, dtype=torch.float32, device=parts["weight"].device), form.bits)
    middle = 2 ** (form.bits - 1)
    codes = (unpack_values(parts["weight"], table, form.bits, shape) - middle).to(torch.int8)
    return codes, None if form.symmetric else (parts["zeros"].int() - middle).to(torch.int8)


def gguf_blocks(form: Block, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """(out, bytes of a row) uint8, as ggml lays blocks out: float16 scale, float16 minimum, fifth bits, low bits. `in`
    is a multiple of the block."""
    assert shape[1] % form.group_size == 0, "ggml has no short blocks"
    size, bits = form.group_size, form.bits
    table = word_table(torch.arange(2**bits, dtype=torch.float32, device=parts["weight"].device), bits)
    codes = unpack_values(parts["weight"], table, bits, (shape[0], shape[1] // size, size)).to(torch.uint8)
    scales = parts["scales"]
    if isinstance(form, Q2_0):
        codes, scales = 3 - codes, -scales
    pieces = [scales] + ([] if form.symmetric else [parts["minimum"]])
    head = [piece[..., None].contiguous().view(torch.uint8) for piece in pieces]
    low, high = codes.view(*codes.shape[:2], 2, size // 2).unbind(2)
    if bits == 8:
        body = [codes ^ 128]  # two's complement of code - 128
    elif bits == 2:
        places = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
        body = [(codes.unflatten(2, (-1, 4)) << places).sum(-1, dtype=torch.uint8)]
    else:
        body = [(low & 15) | ((high & 15) << 4)]
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        body.insert(0, ((codes >> 4).unflatten(2, (-1, 8)) << places).sum(-1, dtype=torch.uint8))
    return torch.cat([*head, *body], -1).flatten(1)
