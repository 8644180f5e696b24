"""What is printed of sizes: the bytes of each part of a checkpoint, and what the same bits give without L R."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .console import human_bytes, say, show_table
from .decomposition import LayerRecord
from .decomposition.embedding import RoundedTable
from .layers import expert_of

_PARTS = {
    "embeddings": "embeddings",
    "head": "output head",
    "backbones": "Q of decomposed layers",
    "factors": "L and R",
    "dense_layers": "dense layers of the blocks",
    "other": "everything else",
}


def show_bytes(parts: Mapping[str, int], when: str = "") -> None:
    """A row per part that there is, with its share. when: of what checkpoint, after a comma."""
    total = sum(parts.values())
    rows = [[_PARTS[name], human_bytes(size), f"{size / total:.1%}"] for name, size in parts.items() if size]
    show_table(f"bytes by part{when}", ["part", "size", "share"], [*rows, ["together", human_bytes(total), ""]])
    if parts["embeddings"] and not parts["head"]:
        say("an output head that is tied to the embeddings is stored with them, once")


def show_embeddings(rounded: Mapping[str, RoundedTable]) -> None:
    """How stored embeddings were rounded."""
    how = {"feedback": "with error feedback on the inputs of the output head", "nearest": "to the nearest"}
    for name, table in rounded.items():
        told = f"rounded {how[table['rounding']]}; relative error {table['error']:.4f}"
        say(f"{name} is stored in {table['format']}, {told}")


def show_equal_bits(layers: Mapping[str, LayerRecord]) -> None:
    """Whether L R pays: feedback rounding without it, at 2, 3 and 4 bits and, between them, at the bits of this run. Of
    layers with more bits than the widest of these, or fewer than the narrowest, nothing can be said."""
    compared = {name: record for name, record in layers.items() if record.equal_bits}
    if not compared:
        return
    rows, ratios = [], []
    for name, record in compared.items():
        own = record.error_calibrated if record.error_heldout is None else record.error_heldout
        assert own is not None, "layers are compared where there is text"
        points = record.equal_bits.values()
        curve = sorted((p["bits"], p["calibrated"] if p["heldout"] is None else p["heldout"]) for p in points)
        cells = [f"{error:.4f} ({bits:.2f})" for bits, error in curve]
        equal = None
        if curve[0][0] <= record.bits_per_weight <= curve[-1][0]:
            equal = _interpolated(curve, record.bits_per_weight)
            ratios.append(max(own, 1e-300) / max(equal, 1e-300))  # a layer of zeros has no error
        shown = "-" if equal is None else f"{equal:.4f}"
        rows.append([kind_of(name), f"{own:.4f} ({record.bits_per_weight:.2f})", *cells, shown])
    block = next(iter(compared)).removesuffix("." + kind_of(next(iter(compared))))
    columns = ["layer", "Q + L R", "2-bit Q", "3-bit Q", "4-bit Q", "Q at equal bits"]
    text = "calibration" if any(record.error_heldout is None for record in compared.values()) else "held-out"
    show_table(
        f"the same bits without L R: {block}, relative error on {text} text (bits per weight), E8 with feedback",
        columns,
        rows,
    )
    if len(ratios) < len(rows):
        say("-: Q + L R has other bits than any of these, so its error is compared with none")
    if not ratios:
        return
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    verdict = "L R makes the error smaller"
    if mean >= 1:
        verdict = "spent on a finer Q, the bits of L R would make the error smaller; L R is also what training changes"
    say(f"error of Q + L R / error of Q alone at the same bits ({len(ratios)} layers): {mean:.2f}; {verdict}")


def _interpolated(curve: list[tuple[float, float]], bits: float) -> float:
    """The error at `bits`, which are within the curve; its logarithm linear in the bits."""
    upper = max(1, next(i for i, (width, _) in enumerate(curve) if width >= bits))
    (a, low), (b, high) = curve[upper - 1], curve[upper]
    share = (bits - a) / (b - a)
    return max(low, 1e-300) ** (1 - share) * max(high, 1e-300) ** share


def kind_of(name: str) -> str:
    part = expert_of(name)
    parts = (name if part is None else part[0]).split(".")
    return next((".".join(parts[i + 1 :]) for i in range(len(parts) - 1, -1, -1) if parts[i].isdigit()), name)
