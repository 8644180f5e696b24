"""Which weights the code of a model computes with itself, outside of the forward of the layer that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..kept import LOOKS
from .blocks import Forward, Run, replaced_forward


class OutsideReads(TorchFunctionMode):
    """While active, collects in `names` the layers of whose weights it sees one handed to a function, be it to write
    into it, while the layer itself does not run; `writes`: whether any parameter of the model was written to."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]):
        super().__init__()
        self.writes = False
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self.names: set[str] = set()
        self.ran = False
        self._layers = dict(layers)
        self._owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            self._owners.setdefault(id(layer.weight), []).append(name)
        self._running: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            return func(*args, **(kwargs or {}))
        handed = [value for value in tree_leaves((args, kwargs or {})) if id(value) in self._parameters]
        for value in handed:
            owners = self._owners.get(id(value), ())
            if not any(name in self._running for name in owners):
                self.names.update(owners)
        versions = [value._version for value in handed]
        result = func(*args, **(kwargs or {}))
        self.writes |= versions != [value._version for value in handed]
        return result

    def watching(self, run: Run) -> Run:
        """`run`, with this active."""

        def watched(model: nn.Module, ids: Tensor) -> object:
            self.ran = True
            with restored_notes(model), replaced_forward(self._layers, self._entering), self:
                return run(model, ids)

        return watched

    def _entering(self, name: str, original: Forward) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            self._running.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                self._running.pop()

        return call


@contextmanager
def restored_notes(model: nn.Module) -> Iterator[None]:
    """Forget at the end what forward passes note in their modules, as that the weights in memory are rescaled now."""
    plain = bool | int | float | str | None
    notes = [(module, {k: v for k, v in vars(module).items() if isinstance(v, plain)}) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in notes:
            vars(module).update(before)
