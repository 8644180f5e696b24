"""What a model's structure says before any weight is read: its blocks, the layers to decompose, the rest."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from ..calibration.blocks import Blocks, find_blocks
from ..errors import LordWarning
from ..layers import fuse_untouched, fused_parameters, select_linears, unfuse
from .base import Settings


@dataclass(frozen=True)
class Survey:
    """What a model's structure says before any weight is read."""

    blocks: Blocks
    layers: dict[str, nn.Module]  # to decompose, by name
    skipped: dict[str, str]  # every other linear layer or fused parameter -> why

    def members(self, index: int) -> dict[str, nn.Module]:
        return {name: module for name, module in self.layers.items() if self.blocks.holds(index, name)}


def survey(model: nn.Module, settings: Settings) -> Survey:
    """Find the blocks and the layers; works on the meta device. Experts to decompose become layers of `model`."""
    blocks = find_blocks(model)
    unfuse(model)
    layers, skipped = select_linears(model, blocks.names(), settings.targets, settings.exclude)
    skipped = fuse_untouched(model, layers, skipped)
    fused = {name: parameter for name, parameter in fused_parameters(model).items() if name not in skipped}
    if fused:
        warnings.warn(
            f"{len(fused)} fused expert parameters stay dense, like {next(iter(fused))} "
            f"({'x'.join(map(str, next(iter(fused.values())).shape))}); they are listed under 'skipped'.",
            LordWarning,
            stacklevel=2,
        )
    skipped |= dict.fromkeys(fused, "fused experts (3-D parameter)")
    return Survey(blocks, layers, skipped)
