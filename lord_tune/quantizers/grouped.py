"""What the scalar formats share: codes of a few bits, one set of scales per group of consecutive inputs of a row.

A group never crosses a row; the last group of a row may be short. A format says how it scales a group, how it finds the
nearest code, and what value a code has; packing, padding, shapes and the linear layer are here.

Stored parts: `weight` uint8, packed codes of the flattened matrix (packing.py), and the scales of the format, (out,
groups) each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from .base import decoded_linear
from .packing import pack, packed_bytes, unpack_values, word_table


@dataclass(frozen=True)
class Grouped:
    """Base of the scalar formats."""

    name: ClassVar[str]
    bits: ClassVar[int]
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"The group size {self.group_size} came; at least 1 is wanted.")

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

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        return {"scales": torch.float16}

    # --- the contract ---

    def groups_of(self, width: int) -> int:
        return -(-width // self.group_size)

    def _grouped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(out, groups, group_size) padded with zeros, and the (groups,) true sizes."""
        width = weight.shape[1]
        groups = self.groups_of(width)
        padded = torch.nn.functional.pad(weight, (0, groups * self.group_size - width))
        counts = torch.full((groups,), self.group_size, device=weight.device)
        counts[-1] = width - (groups - 1) * self.group_size
        return padded.view(weight.shape[0], groups, self.group_size), counts

    def scales_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored scales of a whole matrix. (out, groups) each"""
        groups, counts = self._grouped(weight.detach().float())
        return self.group_scales(groups, counts)

    def round_with(self, values: Tensor, factor: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """(codes uint8, decoded) of values with given per-element factor and offset, all broadcastable."""
        shifted = values if offset is None else values - offset
        codes = self.nearest(torch.where(factor == 0, torch.zeros_like(shifted), shifted / factor))
        decoded = self.book(values.device)[codes.long()].to(values.dtype) * factor
        return codes, decoded if offset is None else decoded + offset

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scales = self.scales_of(weight)
        factor, offset = self.affine(scales)
        groups, _ = self._grouped(weight.detach().float())
        codes, _ = self.round_with(groups, factor[..., None], None if offset is None else offset[..., None])
        codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
        return {"weight": pack(codes, self.bits), **scales}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        device = parts["weight"].device
        table = word_table(self.book(device), self.bits)
        values = unpack_values(parts["weight"], table, self.bits, shape)
        factor, offset = self.affine(parts)
        if shape[1] % self.group_size == 0:
            grouped = values.view(shape[0], -1, self.group_size)
            grouped = grouped.mul_(factor[..., None])
            values = (grouped if offset is None else grouped.add_(offset[..., None])).view(shape)
        else:
            wide = factor.repeat_interleave(self.group_size, 1)[:, : shape[1]]
            values = values * wide
            if offset is not None:
                values = values + offset.repeat_interleave(self.group_size, 1)[:, : shape[1]]
        return values.to(dtype)

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        size = packed_bytes(math.prod(shape), self.bits)
        parts = {"weight": torch.empty(size, dtype=torch.uint8, device=device)}
        for name, dtype in self.scale_dtypes().items():
            parts[name] = torch.empty(shape[0], self.groups_of(shape[1]), dtype=dtype, device=device)
        return parts

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return decoded_linear(x, self, parts, shape)

    def rounder(self, weight: Tensor, stretch: float = 1.0) -> GroupRounder:
        """Rounds columns one by one in the scales of `weight` times `stretch`."""
        return GroupRounder(self, weight, stretch)

    def options(self) -> dict[str, int | bool]:
        return {"group_size": self.group_size}


class GroupRounder:
    """A matrix being rounded column by column (ldlq.Rounder)."""

    block = 1

    def __init__(self, form: Grouped, weight: Tensor, stretch: float):
        scales = form.scales_of(weight)
        if stretch != 1.0:
            scales = {name: (value.float() * stretch).to(value.dtype) for name, value in scales.items()}
        self._form, self._scales = form, scales
        self._factor, self._offset = form.affine(scales)
        self._codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

    def round(self, values: Tensor, start: int) -> Tensor:
        group = start // self._form.group_size
        offset = None if self._offset is None else self._offset[:, group, None]
        codes, decoded = self._form.round_with(values, self._factor[:, group, None], offset)
        self._codes[:, start : start + values.shape[1]] = codes
        return decoded

    def parts(self) -> dict[str, Tensor]:
        return {"weight": pack(self._codes, self._form.bits), **self._scales}
