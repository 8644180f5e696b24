"""Stored bytes and bits of a layer that is decomposed at a rank, from shapes alone."""

from __future__ import annotations

from typing import Any

from ..allocation import factor_cost
from ..layers import shape_of
from ..quantizers import DTYPES, make_quantizer
from .base import Settings


def bits_at(module: Any, rank: int, settings: Settings) -> float:
    """Stored bits per weight of a layer decomposed at this rank."""
    out, inputs = shape_of(module)
    return 8.0 * stored_bytes(module, rank, settings) / (out * inputs)


def stored_bytes(module: Any, rank: int | None, settings: Settings) -> int:
    """Of the weight of one layer in the checkpoint, without its bias."""
    out, inputs = shape_of(module)
    if rank is None:
        return out * inputs * module.weight.element_size()
    total = 0
    if settings.quantizer is not None:
        parts = settings.quantizer.empty((out, inputs), "meta")
        total += sum(p.numel() * p.element_size() for p in parts.values())
    form = settings.factor_format
    own = next((name for name, dtype in DTYPES.items() if dtype == module.weight.dtype), "fp32")
    top = settings.top_rank_of(rank) if settings.rounds_factors else 0
    total += _factor_bytes((out, inputs), top, settings.top_format, settings.top_options)
    return total + _factor_bytes((out, inputs), rank - top, form or own, settings.factor_options)


def _factor_bytes(shape: tuple[int, int], rank: int, form: str, options: dict[str, Any]) -> int:
    """Of L and R."""
    if form in DTYPES:
        return factor_cost(shape, rank) * DTYPES[form].itemsize
    if not rank:
        return 0
    quantizer = make_quantizer(form, options)
    parts = [quantizer.empty(part, "meta") for part in ((shape[0], rank), (rank, shape[1]))]
    return sum(p.numel() * p.element_size() for found in parts for p in found.values())
