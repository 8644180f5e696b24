"""The repeated blocks of a model, found structurally, and how their forward is replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model; without a block list, the model itself as the only 'block'."""

    prefix: str  # module path of the list, "" when the whole model is the block
    modules: tuple[nn.Module, ...]

    def names(self) -> list[str]:
        return [f"{self.prefix}.{i}" if self.prefix else "" for i in range(len(self.modules))]

    def holds(self, index: int, name: str) -> bool:
        """Whether the module or tensor `name` lies inside block `index`."""
        return not self.prefix or name.startswith(f"{self.prefix}.{index}.")


def find_blocks(model: nn.Module) -> Blocks:
    """The longest ModuleList whose members are of one class; lists inside the members of another (experts) and lists of
    mere linear layers are no blocks; the first of equals counts."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(True for _ in next(iter(module)).children())
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        return Blocks("", (model,))
    name = max(outer, key=lambda n: len(outer[n]))
    return Blocks(name, tuple(outer[name]))


class Stop(Exception):
    """Raised by a recorder to end a forward pass early."""


@contextmanager
def replaced_forward(modules: dict[int, nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Give each module another forward for a while: `make(index, original)`."""
    for index, module in modules.items():
        module.forward = make(index, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def first_input(args: tuple, kwargs: dict) -> Tensor:
    """What a layer is called with, also by keyword: `self.fc(input=x)`. For hooks with kwargs."""
    return args[0] if args else next(iter(kwargs.values()))


def hidden_argument(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
