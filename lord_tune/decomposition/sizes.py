"""Stored bytes and bits of a layer that is decomposed as chosen, from shapes alone."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import torch

from ..allocation import PIVOTED, factor_cost
from ..declared import Options
from ..plans import LayerChoice
from ..quantizers import DTYPES, make_quantizer
from ..sites import Site
from .base import LayerRecord


def bits_at(site: Site, choice: LayerChoice) -> float:
    """Stored bits per weight."""
    return 8.0 * stored_bytes(site, choice) / site.numbers


def stored_bytes(site: Site, choice: LayerChoice) -> int:
    """Of the weight of one layer in the checkpoint, without its bias."""
    if choice.rank is None:
        return site.dense_bytes
    return sum(split_bytes(site, choice))


def split_bytes(site: Site, choice: LayerChoice) -> tuple[int, int]:
    """(of Q, of L R) of a decomposed layer."""
    plan = choice.on(site.shape, site.dtype, site.bias, site.conv1d)
    quantizer = choice.quantizer()
    backbone = 0
    if quantizer is not None:
        backbone = sum(p.numel() * p.element_size() for p in quantizer.empty(site.shape, "meta").values())
    out, inputs = site.shape
    total = _matrix_bytes((out, plan.top_rank), (plan.top_rank, inputs), form=plan.top_format, options=plan.top_options)
    rank = plan.rank - plan.top_rank
    if plan.form == PIVOTED:
        total += rank * torch.int32.itemsize
        out -= rank
    total += _matrix_bytes((out, rank), (rank, inputs), form=plan.left_format, options=plan.factor_options)
    return backbone, total


def added_bias_bytes(site: Site, choice: LayerChoice) -> int:
    """Of the bias that a centred method gives a layer without one."""
    if choice.rank is None or site.bias or not choice.on(site.shape, site.dtype, site.bias, site.conv1d).bias:
        return 0
    return site.shape[0] * site.dtype.itemsize


def _matrix_bytes(*shapes: tuple[int, int], form: str, options: Options) -> int:
    """Of matrices in a format, together."""
    numbers = sum(rows * columns for rows, columns in shapes)
    if form in DTYPES or not numbers:
        return numbers * DTYPES[form].itemsize if numbers else 0
    quantizer = make_quantizer(form, options)
    parts = [part for shape in shapes for part in quantizer.empty(shape, "meta").values()]
    return sum(part.numel() * part.element_size() for part in parts)


class Totals(TypedDict):
    """What a report says of all layers together."""

    layers: int
    factored_layers: int
    linear_parameters: int
    kept_fraction: float | None  # None: there are backbones
    parameters_before: float
    parameters: float
    model_bytes_before: float
    model_bytes: float
    bytes_by_part: NotRequired[dict[str, int]]  # of model_bytes
    linear_bits_per_weight: float
    seconds: float
    peak_memory_bytes: NotRequired[int]
    estimated_peak_memory_bytes: NotRequired[int]


def totals_of(
    records: dict[str, LayerRecord], before: dict[str, float], after: dict[str, float], seconds: float
) -> Totals:
    factored = [record for record in records.values() if record.rank != "dense"]
    dense_numbers = sum(r.shape[0] * r.shape[1] for r in records.values())
    kept = sum(
        r.shape[0] * r.shape[1] if isinstance(r.rank, str) else factor_cost(r.shape, r.rank, r.form)
        for r in records.values()
    )
    return {
        "layers": len(records),
        "factored_layers": len(factored),
        "linear_parameters": dense_numbers,
        "kept_fraction": kept / dense_numbers if all(r.backbone == "none" for r in factored) else None,
        "parameters_before": before["parameters"],
        "parameters": after["parameters"],
        "model_bytes_before": before["model_bytes"],
        "model_bytes": after["model_bytes"],
        "linear_bits_per_weight": after["linear_bits_per_weight"],
        "seconds": seconds,
    }
