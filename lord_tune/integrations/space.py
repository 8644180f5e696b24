"""Whether a disk has room for what will be written, asked before any work where the size is known."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from ..console import human_bytes
from ..declared import PIVOTED
from ..errors import LordError
from ..layers import factored_layers, stored_tables


def free_bytes(out: Path) -> int | None:
    """Of the disk of `out`, which need not exist; None of one that does not say."""
    try:
        return shutil.disk_usage(_existing(out)).free
    except OSError:
        return None


def _existing(out: Path) -> Path:
    real = out.resolve()
    return next(parent for parent in (real, *real.parents) if parent.is_dir())


def check_space(out: Path, needed: float, what: str) -> None:
    """LordError if the disk of `out`, which need not exist, has less than `needed` bytes free.

    what: the beginning of the sentence. A disk that does not say what is free is not refused.
    """
    free = free_bytes(out)
    if free is not None and needed > free:
        raise LordError(
            f"{what} needs {human_bytes(needed)} of disk space in {_existing(out)}, where {human_bytes(free)} are "
            "free; make space, or choose an output on another disk."
        )


def bytes_in(folder: Path) -> int:
    """Of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dense_bytes(model: nn.Module, element: int) -> int:
    """Of the parameters of a model, its layers multiplied out, at `element` bytes per number."""
    layers = factored_layers(model)
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    tables = stored_tables(model)
    inside |= {id(parameter) for name in tables for parameter in model.get_submodule(name).parameters()}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    rest += sum(table.shape[0] * table.shape[1] for table in tables.values())
    own = sum(layer.plan.shape[0] * layer.plan.shape[1] for layer in layers.values())
    biases = sum(layer.bias.numel() for layer in layers.values() if layer.bias is not None)
    return element * (rest + own + biases)


def apart_bytes(model: nn.Module, element: int, of_factors: int) -> int:
    """Of a model whose decomposed layers are written as codes of Q, as they are stored, and L R: `element` bytes per
    number of all else, `of_factors` per number of L and R. No adapter is attached."""
    layers = factored_layers(model)
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    biases = sum(layer.bias.numel() for layer in layers.values() if layer.bias is not None)
    codes = numbers = 0
    for layer in layers.values():
        if layer.plan.backbone != "none":
            codes += sum(part.numel() * part.element_size() for part in layer.backbone.parts().values())
        out, width = layer.plan.shape
        numbers += layer.rank * (out + width - (layer.rank if layer.plan.form == PIVOTED else 0))
    return element * (rest + biases) + codes + of_factors * numbers
