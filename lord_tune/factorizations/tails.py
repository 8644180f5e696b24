"""Error curves: what is lost when a decomposition is cut at each of its ranks."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

POINTS = 24  # of a curve that is kept


class Curve(TypedDict):
    """A few points of an error curve, for a record."""

    ranks: list[int]
    errors: list[float]


def along(axes: Tensor, moment: Tensor) -> Tensor:
    """The moment's diagonal in the coordinates of `axes`. (k,)"""
    return ((axes.T @ moment) * axes.T).sum(1)


def tail_curve(energies: Tensor, reference: Tensor) -> Tensor:
    """sqrt(sum over j >= r of energies / reference) for r = 0..k. (k + 1,)"""
    tails = torch.cat([energies.clamp_min(0).flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return (tails / reference.clamp_min(1e-300)).sqrt()


def corner_curve(products: Tensor, reference: Tensor) -> Tensor:
    """sqrt(sum over i, j >= r of products / reference) for r = 0..k. (k + 1,)"""
    corners = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
    return (torch.cat([corners, corners.new_zeros(1)]) / reference.clamp_min(1e-300)).sqrt()


def thinned(curve: Tensor) -> Curve:
    """At most POINTS of a curve (k + 1,): its ranks 0 and k, and between them ranks whose logarithms lie evenly.

    The errors are rounded to four significant digits.
    """
    last = len(curve) - 1
    steps = max(POINTS - 2, 1)
    ranks = sorted({0, last, *(round(last ** (i / steps)) for i in range(steps + 1) if last)})
    return {"ranks": ranks, "errors": [float(f"{float(curve[rank]):.4g}") for rank in ranks]}
