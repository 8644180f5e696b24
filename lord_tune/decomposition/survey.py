"""What a model's structure says before any weight is read: its blocks, the layers to decompose, the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calibration.blocks import Blocks, Run, find_blocks
from ..layers import fuse_untouched, fused_parameters, select_linears, unfuse
from ..sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = "fused experts (3-D parameter)"


@dataclass(frozen=True)
class Survey:
    """Blocks and sites of one model."""

    blocks: Blocks
    layers: dict[str, Site]  # to decompose, by name
    skipped: dict[str, str]  # every other linear layer or fused parameter -> why

    def members(self, index: int) -> dict[str, Site]:
        """The layers of one block."""
        return {name: site for name, site in self.layers.items() if self.blocks.holds(index, name)}

    def notes(self) -> list[str]:
        """What a user should know of what is left alone."""
        notes = []
        if self.blocks.whole:
            notes.append(
                "The model has no list of blocks that run one after the other; all layers are calibrated in one pass, "
                "which holds every weight and every Gram matrix in memory at once."
            )
        fused = [name for name, reason in self.skipped.items() if reason == FUSED]
        if fused:
            notes.append(
                f"{len(fused)} fused expert parameters stay dense, like {fused[0]}; they are listed under 'skipped'."
            )
        return notes


def survey(
    model: PreTrainedModel, targets: str | None = None, exclude: str | None = None, run: Run | None = None
) -> Survey:
    """Find the blocks and the layers; works on the meta device. Experts to decompose become layers of `model`.

    `run` runs the model on (1, length) ids, to see which blocks run in which order.
    """
    blocks = find_blocks(model, run)
    unfuse(model)
    layers, skipped = select_linears(model, blocks.names(), targets, exclude)
    skipped = fuse_untouched(model, layers, skipped)
    skipped |= {name: FUSED for name in fused_parameters(model) if name not in skipped}
    return Survey(blocks, {name: Site.of(name, module) for name, module in layers.items()}, skipped)
