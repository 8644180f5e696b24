"""Layers that the measuring pass made and the writing pass takes over, in working files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..layers import FactoredLinear
from ..storage import write_tensors
from .journal import Journal
from .layerwise import Finished


class Made:
    """Of one run, block by block."""

    def __init__(self) -> None:
        self._done: dict[int, dict[str, Finished]] = {}  # without weights

    def __bool__(self) -> bool:
        return bool(self._done)

    def keep(self, journal: Journal, index: int, done: Mapping[str, Finished]) -> None:
        tensors: dict[str, Tensor] = {}
        known = {}
        for name, finished in done.items():
            empty = None
            if finished.layer is not None:
                tensors |= {f"{name}.{key}": value for key, value in finished.layer.state_dict().items()}
                empty = FactoredLinear(finished.layer.plan, device="meta", dtype=finished.layer.dtype)
            known[name] = Finished(finished.record, empty)
        self._done[index] = known
        if journal.writes:
            write_tensors(journal.work / _file(index), tensors)

    def restored(self, journal: Journal, index: int, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Finished]:
        """With their weights, for one use. read: of a working file."""
        tensors = read(_file(index))
        for name, finished in self._done[index].items():
            if finished.layer is not None:
                own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                finished.layer.load_state_dict(own, strict=True, assign=True)
        if journal.writes:
            (journal.work / _file(index)).unlink()
        return self._done.pop(index)


def _file(index: int) -> str:
    return f"made-{index:05d}.safetensors"
