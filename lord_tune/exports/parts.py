"""The tensors of a model that is taken apart: each is read when it is asked for, and let go once it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..integrations.checkpoint import tensors_with
from ..memory import give_back, settle


class Store(Protocol):
    """Where those tensors of a model are that are not in memory, by the names of its `state_dict`."""

    def load(self, names: Iterable[str]) -> None:
        """Bring them into memory, if they are not there."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Let go of those that can be brought again."""
        ...


class Present:
    """The `Store` of a model that is in memory."""

    def load(self, names: Iterable[str]) -> None:
        pass

    def release(self, names: Iterable[str]) -> None:
        pass


PRESENT = Present()


class Parts:
    """A model's tensors by the names that they have now. What is let go leaves a tensor without values, in all places
    that shared it."""

    def __init__(
        self,
        model: nn.Module,
        store: Store = PRESENT,
        keep: bool = False,  # whether the model is needed afterwards as it was
    ):
        self._model, self._store, self._keep = model, store, keep
        held: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for tensors, leaf, tensor in places_in(model):
            held.setdefault(id(tensor), []).append((tensors, leaf))
        self._shared = [places for places in held.values() if len(places) > 1]

    def load(self, *paths: str) -> None:
        """All tensors of these modules, or these tensors."""
        self._store.load([name for path in paths for name in self._below(path)])

    def read(self, name: str) -> Tensor:
        self._store.load([name])
        path, _, leaf = name.rpartition(".")
        found: Tensor = tensors_with(self._model.get_submodule(path), leaf)[leaf]
        return found.detach()

    def put(self, name: str, tensor: Tensor) -> None:
        """In all places that share it."""
        path, _, leaf = name.rpartition(".")
        tensors = tensors_with(self._model.get_submodule(path), leaf)
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(tensors[leaf], nn.Parameter) else tensor
        for owner, key in self._places(tensors, leaf):
            owner[key] = new

    @contextmanager
    def seen(self, *paths: str) -> Iterator[None]:
        """With all tensors of these modules in memory, which are needed once more later."""
        names = [name for path in paths for name in self._below(path)]
        self._store.load(names)
        yield
        self._store.release(names)

    @contextmanager
    def held(self, *paths: str) -> Iterator[None]:
        """With all tensors of these modules in memory, which nobody needs afterwards."""
        self.load(*paths)
        yield
        self.let_go(name for path in paths for name in self._below(path))

    def let_go(self, names: Iterable[str]) -> None:
        for name in () if self._keep else names:
            path, _, leaf = name.rpartition(".")
            tensors = tensors_with(self._model.get_submodule(path), leaf)
            if leaf in tensors:  # and no stored table
                empty = emptied(tensors[leaf])
                for owner, key in self._places(tensors, leaf):
                    owner[key] = empty
        give_back()

    def _below(self, path: str) -> list[str]:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:  # a tensor
            return [path]
        return [f"{path}.{name}" for name in module.state_dict()]

    def _places(self, tensors: dict[str, Any], leaf: str) -> list[tuple[dict[str, Any], str]]:
        """Of a tensor, all that share it."""
        for places in self._shared:
            if any(tensors is owner and leaf == key for owner, key in places):
                return places
        return [(tensors, leaf)]


def places_in(model: nn.Module) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
    """Where each tensor of a model hangs: parameters or buffers of a module, its name there, itself."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((tensors, leaf, tensor) for leaf, tensor in list(tensors.items()) if tensor is not None)


def emptied(tensor: Tensor) -> Tensor:
    """The same on the meta device."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def to_nothing(model: nn.Module) -> None:
    """Let go of everything that a model holds, whoever still refers to the model."""
    for tensors, leaf, tensor in places_in(model):
        tensors[leaf] = emptied(tensor)
    settle()
