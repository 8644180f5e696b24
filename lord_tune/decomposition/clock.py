"""How far a run is, and what is left of it."""

from __future__ import annotations

import time

from .base import LayerRecord, Notify, Progress
from .steps import Phase


class Clock:
    """Counts finished blocks and foresees the rest from what the passes cost relative to each other."""

    def __init__(self, blocks: int, costs: dict[Phase, float], notify: Notify):
        # of one block, relative; the passes in their order
        self._blocks, self._costs, self._notify = blocks, costs, notify
        self._start = time.perf_counter()
        self._spent = 0.0

    def report(
        self,
        phase: Phase,
        index: int,
        layers: dict[str, LayerRecord] | None = None,
        total: int | None = None,  # of a pass in other steps than blocks
    ) -> None:
        """Block (or step) `index` of this pass is done."""
        total = total or self._blocks
        done = index + 1 if phase != Phase.SENSITIVITY else self._blocks - index
        share = self._blocks / total
        self._spent += self._costs[phase] * share
        ahead = 0.0
        order = list(self._costs)
        for other, cost in self._costs.items():
            blocks = self._blocks if order.index(other) > order.index(phase) else 0
            ahead += ((total - done) * share if other == phase else blocks) * cost
        elapsed = time.perf_counter() - self._start
        remaining = elapsed / self._spent * ahead if self._spent else None
        self._notify(Progress(phase, done, total, remaining, layers or {}))
