"""Uniform integer codes per group: affine (minimum to maximum, the default) or symmetric (no zero point).

Plain rounding to the nearest, as in GPTQ's and AWQ's storage. Scales are float16; an affine zero point is a float16
minimum, so that constant groups and any range are exact at their ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declared import Options, option
from .base import stored_half, stored_scales
from .grouped import Grouped


@dataclass(frozen=True)
class Integer(Grouped):
    """weight = scale * code + minimum, or scale * (code - 2^(bits-1))."""

    symmetric: bool = option(False, "no zero point")

    def book(self, device: torch.device) -> Tensor:
        codes = torch.arange(2**self.bits, dtype=torch.float32, device=device)
        return codes - 2 ** (self.bits - 1) if self.symmetric else codes

    def group_scales(self, groups: Tensor, counts: Tensor) -> dict[str, Tensor]:
        if self.symmetric:
            largest = groups.abs().amax(-1)
            return {"scales": stored_scales(largest / (2 ** (self.bits - 1) - 1))}
        inside = torch.arange(groups.shape[-1], device=groups.device) < counts[:, None]
        low = stored_half(torch.where(inside, groups, torch.inf).amin(-1))
        high = torch.where(inside, groups, -torch.inf).amax(-1)
        scales = stored_scales((high - low.float()) / (2**self.bits - 1), beside=low)
        return {"scales": scales, "minimum": low}

    def affine(self, scales: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return scales["scales"].float(), None if self.symmetric else scales["minimum"].float()

    def nearest(self, normalised: Tensor) -> Tensor:
        return self._codes_of(normalised).to(torch.uint8)

    def rounded(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        codes = self._codes_of(normalised)
        return codes.to(torch.uint8), codes - 2 ** (self.bits - 1) if self.symmetric else codes

    def _codes_of(self, normalised: Tensor) -> Tensor:
        shifted = normalised + 2 ** (self.bits - 1) if self.symmetric else normalised
        return shifted.round().clamp_(0, 2**self.bits - 1)

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        return {"scales": torch.float16} | ({} if self.symmetric else {"minimum": torch.float16})

    def options(self) -> Options:
        return {"group_size": self.group_size, "symmetric": self.symmetric}


class Int2(Integer):
    """2.5 bits per weight at groups of 64 (symmetric: 2.25)."""

    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2


class Int3(Integer):
    """3.5 bits per weight at groups of 64 (symmetric: 3.25)."""

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


class Int4(Integer):
    """4.5 bits per weight at groups of 64 (symmetric: 4.25)."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


class Int8(Integer):
    """8.5 bits per weight at groups of 64 (symmetric: 8.25)."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    def code_values(self, packed: Tensor, out: Tensor) -> Tensor:
        """One code per byte: converting is faster than a table."""
        out.copy_(packed.view(out.shape))
        return out.sub_(2 ** (self.bits - 1)) if self.symmetric else out
