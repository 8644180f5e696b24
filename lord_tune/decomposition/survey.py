"""What a model's structure says before any weight is read: its blocks, the layers to decompose, the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calibration.blocks import Blocks, Run, find_blocks, observe, whole_model
from ..calibration.handed import foreseen
from ..calibration.reads import OutsideReads
from ..layers import SHARED, fuse_untouched, fused_parameters, is_linear, select_linears, unfuse
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
    follows: str = ""  # why the parts outside the blocks stay in memory for calibration; "" where they do not

    def members(self, index: int) -> dict[str, Site]:
        """The layers of one block."""
        return {name: site for name, site in self.layers.items() if self.blocks.holds(index, name)}

    def notes(self) -> list[str]:
        """What a user should know of what is left alone."""
        notes = []
        if self.blocks.whole:
            notes.append(
                "The model has no list of blocks that run one after the other, or it writes into its weights; all "
                "layers are calibrated in one pass, which holds every weight and every Gram matrix in memory at once."
            )
        if self.follows:
            notes.append(
                f"The blocks do not only hand their hidden states on ({self.follows}), so calibration follows the "
                "model's own forward, and the parts outside the blocks stay in memory."
            )
        fused = [name for name, reason in self.skipped.items() if reason == FUSED]
        if fused:
            notes.append(
                f"{len(fused)} fused expert parameters stay dense, like {fused[0]}; they are listed under 'skipped'."
            )
        shared = [(name, reason) for name, reason in self.skipped.items() if reason.startswith(SHARED)]
        if shared:
            name, reason = shared[0]
            notes.append(
                f"{len(shared)} layers share their weights and stay dense, like {name}, which {reason}; they are "
                "listed under 'skipped'."
            )
        return notes


def _block_numbers(blocks: Blocks, names: list[str]) -> dict[str, int]:
    """Layer -> the number of its block; without blocks every layer is one."""
    if blocks.whole:
        return {name: number for number, name in enumerate(names)}
    return {name: next(i for i in range(len(blocks.paths)) if blocks.holds(i, name)) for name in names}


def survey(
    model: PreTrainedModel, targets: str | None = None, exclude: str | None = None, run: Run | None = None
) -> Survey:
    """Find the blocks and the layers; works on the meta device. Experts to decompose become layers of `model`.

    `run` runs the model on (1, length) ids, to see which blocks run in which order and which weights are computed with
    outside of their layers.
    """
    reads = OutsideReads(model, {name: module for name, module in model.named_modules() if is_linear(module)})
    watched = None if run is None else reads.watching(run)
    blocks = find_blocks(model, watched)
    if watched is not None and not reads.ran:
        observe(model, watched)
    if reads.writes:  # to weights that a walk would load again at every block
        blocks = whole_model(model)
    follows = "" if run is None or blocks.whole else foreseen(model, blocks, run)
    unfuse(model)
    layers, skipped = select_linears(model, blocks.names(), targets, exclude, reads.names)
    skipped = fuse_untouched(model, layers, skipped)
    skipped |= {name: FUSED for name in fused_parameters(model) if name not in skipped}
    numbers = _block_numbers(blocks, list(layers))
    sites = {name: Site.of(name, module, numbers[name]) for name, module in layers.items()}
    return Survey(blocks, sites, skipped, follows)
