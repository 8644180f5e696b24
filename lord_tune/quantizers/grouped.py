"""What the scalar formats share: codes of a few bits, one set of scales per group of consecutive inputs of a row.

A group never crosses a row; the last group of a row may be short. A format says how it scales a group, how it finds the
nearest code, and what value a code has; packing, padding, shapes and the linear layer are here.

Stored parts: `weight` uint8, packed codes of the flattened matrix (packing.py), and the scales of the format, (out,
groups) each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declared import Options, option
from ..errors import UsageError
from .base import Format, constant, in_chunks, stored_half
from .packing import aligned_codes, pack, packed_bytes, unpack_values, word_table


@dataclass(frozen=True)
class Grouped(Format):
    """Base of the scalar formats."""

    name: ClassVar[str]
    bits: ClassVar[int]
    group_size: int = option(64, "weights per scale", gt=0)

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"Got group size {self.group_size}; expected at least 1.")

    # --- what a format defines ---

    def book(self, device: torch.device) -> Tensor:
        """Value of each code before scaling. (2^bits,) float32"""
        raise NotImplementedError

    def group_scales(self, groups: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Stored scales of groups (..., group) padded with zeros; `counts` (...,) are the true sizes. (...,) each"""
        raise NotImplementedError

    def nearest(self, normalised: Tensor) -> Tensor:
        """The code of each normalised value, uint8."""
        raise NotImplementedError

    def affine(self, scales: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(factor, offset): weight = factor * book[code] + offset; float32, shapes of the scales."""
        return scales["scales"].float(), None

    def stretched(self, scales: dict[str, Tensor], stretch: Tensor | float) -> dict[str, Tensor]:
        """The scales times `stretch`, as they are stored; of each row as (out, 1)."""
        return {name: stored_half(value.float() * stretch) for name, value in scales.items()}

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        return {"scales": torch.float16}

    # --- the contract ---

    def groups_of(self, width: int) -> int:
        return -(-width // self.group_size)

    def grouped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(out, groups, group_size or, in one group, in) padded with zeros, and the (groups,) true sizes."""
        width = weight.shape[1]
        groups, size = self.groups_of(width), min(self.group_size, width)
        padded = torch.nn.functional.pad(weight, (0, groups * size - width))
        counts = torch.full((groups,), size, device=weight.device)
        counts[-1] = width - (groups - 1) * size
        return padded.view(weight.shape[0], groups, size), counts

    def scales_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored scales of a whole matrix. (out, groups) each"""
        groups, counts = self.grouped(weight.detach().float())
        return self.group_scales(groups, counts)

    def rounded(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, their values before scaling, float32)"""
        codes = self.nearest(normalised)
        return codes, _book(self, str(normalised.device))[codes.long()]

    def rounding(self, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`rounded` for many calls with tensors of this device: what it looks up is at hand."""
        return self.rounded

    def round_with(
        self,
        values: Tensor,
        factor: Tensor,
        offset: Tensor | None,
        divisor: Tensor | None = None,  # that of the factor, where the caller has it
        rounded: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,  # likewise
    ) -> tuple[Tensor, Tensor]:
        """(codes uint8, decoded) of values with given per-element factor and offset, all broadcastable."""
        shifted = values if offset is None else values - offset
        codes, points = (rounded or self.rounded)(shifted / (divisor_of(factor) if divisor is None else divisor))
        decoded = points.to(values.dtype) * factor
        return codes, decoded if offset is None else decoded + offset

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scales = self.scales_of(weight)
        factor, offset = self.affine(scales)
        groups, _ = self.grouped(weight.detach().float())
        codes, _ = self.round_with(groups, factor[..., None], None if offset is None else offset[..., None])
        codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
        return {"weight": pack(codes, self.bits), **scales}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return in_chunks(self, parts, shape, dtype)

    def code_values(self, packed: Tensor, out: Tensor) -> Tensor:
        """Value of each code before scaling, in `out` (rows, in) if its size allows. float32"""
        shape = (out.shape[0], out.shape[1])
        return unpack_values(packed, _table(self, str(packed.device)), self.bits, shape, out)

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        scale_groups(out, self.code_values(parts["weight"], out), *self.affine(parts), self.group_size)

    def row_step(self, shape: tuple[int, int]) -> int:
        codes = aligned_codes(self.bits)
        return codes // math.gcd(codes, shape[1])

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        scales = {name: parts[name][start:stop] for name in self.scale_dtypes()}
        return parts | {"weight": self.code_rows(parts["weight"], shape, start, stop)} | scales

    def code_rows(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """The packed codes of rows start..stop; start is a multiple of row_step."""
        first, last = (packed_bytes(row * shape[1], self.bits) for row in (start, stop))
        return packed[first:last]

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        size = packed_bytes(math.prod(shape), self.bits)
        parts = {"weight": torch.empty(size, dtype=torch.uint8, device=device)}
        for name, dtype in self.scale_dtypes().items():
            parts[name] = torch.empty(shape[0], self.groups_of(shape[1]), dtype=dtype, device=device)
        return parts

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> GroupRounder:
        """Rounds columns one by one in the scales of `weight` times `stretch`."""
        return GroupRounder(self, weight, stretch)

    def options(self) -> Options:
        return {"group_size": self.group_size}


def divisor_of(factor: Tensor) -> Tensor:
    """What values are divided by: a group whose factor is 0 has the code of 0."""
    return torch.where(factor == 0, torch.inf, factor)


@constant
def _book(form: Grouped, device: str) -> Tensor:
    return form.book(torch.device(device))


@constant
def _table(form: Grouped, device: str) -> Tensor:
    return word_table(form.book(torch.device(device)), form.bits)


def scale_groups(
    out: Tensor,  # (rows, in)
    values: Tensor,  # (rows, in), may be `out`
    factor: Tensor,  # (rows, groups)
    offset: Tensor | None,
    group_size: int,
) -> None:
    """out = factor * values + offset by groups of consecutive columns. The product is rounded before the sum: addcmul
    rounds once or twice depending on where its vectors end, and would make tiles differ from the whole."""
    width = values.shape[1]
    whole = width // group_size * group_size
    for start, stop, size in ((0, whole, group_size), (whole, width, width - whole)):
        if start == stop:
            continue
        groups = slice(start // group_size, -(-stop // group_size))
        target = out[:, start:stop].unflatten(1, (-1, size))
        torch.mul(values[:, start:stop].unflatten(1, (-1, size)), factor[:, groups, None], out=target)
        if offset is not None:
            target.add_(offset[:, groups, None])


class GroupRounder:
    """A matrix being rounded column by column (ldlq.Rounder)."""

    block = 1

    def __init__(self, form: Grouped, weight: Tensor, stretch: float | Tensor):
        scales = form.scales_of(weight)
        if isinstance(stretch, Tensor) or stretch != 1.0:
            scales = form.stretched(scales, stretch)
        self._form, self._scales = form, scales
        factor, offset = form.affine(scales)
        self._factor = factor.T.contiguous()  # (groups, out)
        self._offset = None if offset is None else offset.T.contiguous()
        self._divisor = divisor_of(self._factor)
        self._rounded = form.rounding(weight.device)
        self._codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)

    def round(self, values: Tensor, start: int) -> Tensor:
        group = start // self._form.group_size
        offset = None if self._offset is None else self._offset[group]
        factor, divisor = self._factor[group], self._divisor[group]
        codes, decoded = self._form.round_with(values, factor, offset, divisor, self._rounded)
        self._codes[start : start + len(values)] = codes
        return decoded

    def parts(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        if rows is None:
            return {"weight": pack(self._codes.T, self._form.bits), **self._scales}
        scales = {name: value[rows] for name, value in self._scales.items()}
        return {"weight": pack(self._codes[:, rows].T, self._form.bits), **scales}
