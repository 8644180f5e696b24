"""Scalar Lloyd-Max codes: the levels that minimise the squared error of a normal distribution, scaled by the RMS of
each group (Lloyd 1957/1982, Max 1960).

Scaling by the RMS rather than the absolute maximum matters at few bits: at 2 bits the error of a normal weight is 0.118
of its variance, of NF2-like absmax scaling 0.317 (a prototype; tests/test_quantizers.py measures the first).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .base import constant, stored_scales
from .grouped import Grouped


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels for unit variance, increasing, by Lloyd's iteration with exact normal integrals."""
    n = 2**bits
    points = torch.linspace(-2.0, 2.0, n, dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([torch.tensor([-math.inf]), (points[1:] + points[:-1]) / 2, torch.tensor([math.inf])])
        density = torch.exp(-(edges.clamp(-40, 40) ** 2) / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1])
        updated = (density[:-1] - density[1:]) / mass
        if float((updated - points).abs().max()) < 1e-14:
            break
        points = updated
    points = (points - points.flip(0)) / 2  # symmetric to the last bit
    return tuple(points.tolist())


@constant
def _levels(bits: int, device: str) -> Tensor:
    return torch.tensor(levels(bits), dtype=torch.float32, device=device)


@constant
def _edges(bits: int, device: str) -> Tensor:
    """Where the nearest level changes. (2^bits - 1,)"""
    book = _levels(bits, device)
    return (book[1:] + book[:-1]) / 2


class _Lloyd(Grouped):
    """16-bit scale per group; the code book is the same for every layer."""

    bits: ClassVar[int]
    rotated_by_default: ClassVar[bool] = True

    def book(self, device: torch.device) -> Tensor:
        return _levels(self.bits, str(device))

    def group_scales(self, groups: Tensor, counts: Tensor) -> dict[str, Tensor]:
        rms = (groups.square().sum(-1) / counts).sqrt()
        return {"scales": stored_scales(rms, zero_is_a_code=False)}

    def nearest(self, normalised: Tensor) -> Tensor:
        return torch.bucketize(normalised.contiguous(), _edges(self.bits, str(normalised.device))).to(torch.uint8)

    def rounding(self, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        book, edges = self.book(device), _edges(self.bits, str(device))

        def rounded(normalised: Tensor) -> tuple[Tensor, Tensor]:
            places = torch.bucketize(normalised.contiguous(), edges)
            return places, book.take(places)

        return rounded


class Lloyd2(_Lloyd):
    """4 levels; 2.25 bits per weight at groups of 64."""

    name: ClassVar[str] = "lloyd2"
    bits: ClassVar[int] = 2


class Lloyd3(_Lloyd):
    """8 levels; 3.25 bits per weight at groups of 64."""

    name: ClassVar[str] = "lloyd3"
    bits: ClassVar[int] = 3


class Lloyd4(_Lloyd):
    """16 levels; 4.25 bits per weight at groups of 64."""

    name: ClassVar[str] = "lloyd4"
    bits: ClassVar[int] = 4
