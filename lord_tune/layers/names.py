"""What the name of a layer says of its place."""

from __future__ import annotations


def place_of(name: str) -> tuple[str, int | None, str]:
    """(the stack of blocks, the block, what the layer is called inside it; numbers of experts as *): model.layers, 3,
    mlp.experts.*.up of model.layers.3.mlp.experts.7.up. Of a layer outside of blocks ("", None, its name)."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return "", None, name
    kind = ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])
    return ".".join(parts[:first]), int(parts[first]), kind
