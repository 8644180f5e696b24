"""Budgets: the ranks that shapes alone decide, and the refusal of impossible ones before any calibration."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from ..allocation import ALIGNMENT, LayerSpectrum, break_even, factor_cost
from ..errors import LordWarning, UsageError
from ..layers import shape_of
from ..quantizers import Quantizer
from .base import Settings
from .sizes import bits_at
from .survey import Survey


def needs_text(settings: Settings) -> bool:
    """Whether the settings cannot be carried out without calibration text."""
    needs = settings.method.needs | (settings.allocator.needs if settings.kept_fraction is not None else frozenset())
    return bool(needs & {"input_gram", "loss_weights", "fisher"})


def _rank_within(module: Any, bits: float, settings: Settings) -> int:
    """The largest multiple of 8, or 0, at which the layer takes at most `bits` per weight."""
    low, high = 0, min(shape_of(module)) // ALIGNMENT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bits_at(module, middle * ALIGNMENT, settings) <= bits else (low, middle - 1)
    return low * ALIGNMENT


def known_ranks(layers: dict[str, nn.Module], settings: Settings) -> dict[str, int | None] | None:
    """The rank of every layer (None: dense) where shapes alone decide it."""
    shapes = {name: shape_of(module) for name, module in layers.items()}
    if settings.rank is not None:
        dense = settings.quantizer is None  # above break-even, L and R would be larger than W
        return {n: None if dense and settings.rank > break_even(s) else settings.rank for n, s in shapes.items()}
    if settings.bits_per_weight is not None:
        budget = settings.bits_per_weight
        by_shape: dict[tuple, int] = {}
        for name, module in layers.items():
            key = (shapes[name], module.weight.dtype)
            if key not in by_shape:
                by_shape[key] = _rank_within(module, budget, settings)
        return {name: by_shape[shapes[name], module.weight.dtype] for name, module in layers.items()}
    assert settings.kept_fraction is not None
    if settings.allocator.needs:
        return None
    empty = {name: LayerSpectrum(shape, torch.zeros(min(shape) + 1)) for name, shape in shapes.items()}
    return settings.allocator.allocate(empty, settings.kept_fraction)


def check_budget(layers: dict[str, nn.Module], settings: Settings) -> None:
    """Refuse impossible ranks before any calibration."""
    shapes = {name: shape_of(module) for name, module in layers.items()}
    budgets = (settings.rank, settings.kept_fraction, settings.bits_per_weight)
    if sum(budget is not None for budget in budgets) != 1:
        raise UsageError("Give --rank, --kept-fraction or --bits-per-weight, exactly one of them.")
    if settings.bits_per_weight is not None:
        _check_bits(layers, settings)
        return
    if settings.kept_fraction is not None:
        if settings.quantizer is not None:
            raise UsageError("--kept-fraction counts parameters of L and R against W; with a --backbone give --rank.")
        settings.allocator.allocate(
            {n: LayerSpectrum(s, torch.zeros(min(s) + 1)) for n, s in shapes.items()}, settings.kept_fraction
        )
        return
    rank = settings.rank
    assert rank is not None
    if rank < (1 if settings.quantizer is None else 0):
        raise UsageError(f"--rank {rank} came; a rank is at least 1 (0 is plain rounding and needs a --backbone).")
    if settings.quantizer is not None:
        small = {name: shape for name, shape in shapes.items() if rank > min(shape)}
        if small:
            name, shape = next(iter(small.items()))
            raise UsageError(
                f"--rank {rank} exceeds the smaller side of {len(small)} layers (like {name}, {shape[0]}x{shape[1]}); "
                f"choose at most {min(map(min, shapes.values()))} or --exclude them."
            )
    elif all(rank > break_even(shape) for shape in shapes.values()):
        best = max(map(break_even, shapes.values()))
        raise UsageError(
            f"--rank {rank} is above break-even for every layer: L and R would hold more numbers than W. "
            f"Choose at most {best}, or add --backbone nf4."
        )


def _check_bits(layers: dict[str, nn.Module], settings: Settings) -> None:
    if settings.quantizer is None:
        raise UsageError("--bits-per-weight shares bits between Q and L R; with --backbone none give --kept-fraction.")
    assert settings.bits_per_weight is not None
    needed = {name: bits_at(module, 0, settings) for name, module in layers.items()}
    name = max(needed, key=lambda n: needed[n])
    if needed[name] > settings.bits_per_weight:
        raise UsageError(
            f"--bits-per-weight {settings.bits_per_weight:g} came; {settings.quantizer.name} alone takes "
            f"{needed[name]:.3f} for '{name}'. Give more, or a --backbone of fewer bits."
        )


def fit_format(
    layers: dict[str, nn.Module],
    settings: Settings,
    formats: list[Quantizer],  # narrowest first
    bits: float,
    smallest_rank: int = ALIGNMENT,
) -> Settings:
    """The settings with the widest format that leaves every layer at least `smallest_rank` within `bits` per weight.

    Width goes to Q first: at equal bits feedback rounding gains more from another bit than from a rank at widths up to
    a few thousand (the table of equal bits after each run says by how much), and L R is there to be trained.
    """
    for quantizer in reversed(formats):
        tried = dataclasses.replace(settings, quantizer=quantizer)
        if all(bits_at(module, smallest_rank, tried) <= bits for module in layers.values()):
            return tried
    least = dataclasses.replace(settings, quantizer=formats[0])
    needed = max(bits_at(module, smallest_rank, least) for module in layers.values())
    raise UsageError(
        f"--bits-per-weight {bits:g} came; the narrowest format, {formats[0].name}, takes {needed:.3f} with rank "
        f"{smallest_rank}. Give at least that{', a coarser --factor-format, or --rank 0' if smallest_rank else ''}."
    )


def check_kept(found: Survey, ranks: dict[str, int | None], settings: Settings) -> None:
    """Warn where an allocator keeps more than was asked for."""
    if settings.kept_fraction is None:
        return
    shapes = {name: shape_of(found.layers[name]) for name in ranks}
    numbers = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    costs = {name: numbers[name] if rank is None else factor_cost(shapes[name], rank) for name, rank in ranks.items()}
    kept = sum(costs.values()) / sum(numbers.values())
    if kept > settings.kept_fraction + 1e-9:
        dense = [name for name, rank in ranks.items() if rank is None]
        warnings.warn(
            f"{kept:.3f} of the parameters are kept, {settings.kept_fraction:g} were asked for: {len(dense)} layers, "
            f"like {dense[0]}, would get less than the smallest rank and stay dense.",
            LordWarning,
            stacklevel=2,
        )
