"""Few blocks, far apart, decomposed as far as offered; all others dense (Moar et al., arXiv 2405.06626).

The paper's rules for choosing layers: decomposed blocks should not be neighbours, the first and the last should stay as
they are, and the rank matters little beside which layers it is given to, rank 1 included. So every layer of a chosen
block takes its cheapest choice, which is the given rank where one is given. Nothing is measured.

The blocks are the fewest that meet the budget, at even distances between the first and the last; of the last one that
is needed only as many layers as are needed. Neighbours are chosen when more than half of the blocks have to be, the
last and then the first block when those between are not enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .base import Choices, check_budget


@dataclass(frozen=True)
class Spread:
    """The fewest evenly spaced blocks whose layers, at their cheapest, meet the budget."""

    name: ClassVar[str] = "spread"
    needs: ClassVar[frozenset[str]] = frozenset()

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        check_budget(layers, budget)
        chosen = {name: int((layer.costs - layer.dense).abs().argmin()) for name, layer in layers.items()}
        excess = sum(float(layer.costs[chosen[name]]) for name, layer in layers.items()) - budget
        for name in _order(layers, excess):
            if excess <= 0:
                break
            layer = layers[name]
            excess -= float(layer.costs[chosen[name]] - layer.costs.min())
            chosen[name] = layer.cheapest()
        return chosen


def _order(layers: Mapping[str, Choices], excess: float) -> list[str]:
    """The layers in the order in which they are decomposed until `excess` is saved."""
    members: dict[int, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.block, []).append(name)
    saved = {
        block: sum(max(layers[name].dense - float(layers[name].costs.min()), 0.0) for name in names)
        for block, names in members.items()
    }
    first, *inner = sorted(saved)
    last = [inner.pop()] if inner else []
    picked = inner
    for count in range(1, len(inner) + 1):
        spaced = evenly(inner, count)
        if sum(saved[block] for block in spaced) >= excess:
            picked = spaced
            break
    return [name for block in (*picked, *last, first) for name in members[block]]


def evenly(blocks: list[int], count: int) -> list[int]:
    """`count` of them at even distances, in their order; no two neighbours while they are at most half."""
    return [blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)]
