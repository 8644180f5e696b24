"""The repeated blocks of a model, found by what its forward runs, and how their forward is replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CalibrationError
from .trees import tensors

Run = Callable[[nn.Module, Tensor], object]  # runs a model on (1, length) ids
Forward = Callable[..., Any]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model, in the order in which its forward runs them; without any, the model itself as the
    only 'block'."""

    paths: tuple[str, ...]  # module path of each; "" when the whole model is the block
    modules: tuple[nn.Module, ...]
    calls: tuple[int, ...] = ()  # how often each runs, one call after the other; empty: once

    @property
    def whole(self) -> bool:
        """The model has no blocks and is run whole."""
        return self.paths == ("",)

    def names(self) -> list[str]:
        return list(self.paths)

    def runs(self, index: int) -> int:
        """How often block `index` runs in a forward pass."""
        return self.calls[index] if self.calls else 1

    def holds(self, index: int, name: str) -> bool:
        """Whether the module or tensor `name` lies inside block `index`."""
        return self.whole or name.startswith(f"{self.paths[index]}.")


def find_blocks(model: nn.Module, run: Run | None = None) -> Blocks:
    """The members of the outermost module lists that a forward pass on text runs: encoder and decoder, attention and
    feed-forward lists, but no vision tower.

    `run` runs the model, which may be a skeleton on the meta device, on ids. Without `run`, or where a skeleton cannot
    run without values, the lists of the text encoder and decoder count, in the order of the modules. A model that comes
    back to a block after it has run another one cannot be walked block by block: it is run whole.
    """
    members = {path: module for _, block_list in _outer_lists(model) for path, module in block_list.items()}
    calls = _observed_calls(model, members, run) if run is not None and members else None
    if calls is None:
        calls = [path for _, block_list in _text_lists(model) for path in block_list]
    order: list[str] = []
    counts: dict[str, int] = {}
    for path in calls:
        if path in counts and order[-1] != path:
            return whole_model(model)
        if path not in counts:
            order.append(path)
        counts[path] = counts.get(path, 0) + 1
    if not order:
        return whole_model(model)
    return Blocks(tuple(order), tuple(members[p] for p in order), tuple(counts[p] for p in order))


def whole_model(model: nn.Module) -> Blocks:
    """The model as the only block."""
    return Blocks(("",), (model,))


def _outer_lists(model: nn.Module) -> list[tuple[str, dict[str, nn.Module]]]:
    """Every list of modules that have parts of their own and that lies in no other such list: (path, path -> member).
    Lists inside the members of another (experts) and lists of mere linear layers are no blocks."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in next(iter(module)).children())
    }
    return [
        (name, {f"{name}.{i}" if name else str(i): member for i, member in enumerate(found)})
        for name, found in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]


def _text_lists(model: nn.Module) -> list[tuple[str, dict[str, nn.Module]]]:
    """Of the text encoder and decoder that transformers names, else of the whole model."""
    lists = _outer_lists(model)
    paths = {id(module): path for path, module in model.named_modules()}
    roots = []
    for name in ("get_encoder", "get_decoder"):
        found = getattr(model, name)() if hasattr(model, name) else None
        path = paths.get(id(found))
        if path and any(n.startswith(f"{path}.") for n, _ in lists):
            roots.append(path)
    return [entry for entry in lists if not roots or any(entry[0].startswith(f"{root}.") for root in roots)]


class AnyScalar(TorchDispatchMode):
    """A number for whoever asks a tensor without values for one: masks and packed sequences are looked for by value."""

    def __init__(self) -> None:  # torch's has no types
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def _observed_calls(model: nn.Module, members: Mapping[str, nn.Module], run: Run) -> list[str] | None:
    """The paths of the members in the order in which a forward pass runs them; None where none can be made."""
    for parts in (0, 1, 2, 3):  # what a block that cannot run without values is taken to return: a tensor, or a tuple
        calls: list[str] = []
        with replaced_forward(members, _counting(calls, parts)):
            if observe(model, run):
                return calls
    return None


def observe(model: nn.Module, run: Run) -> bool:
    """Run a model, which may be on the meta device, on some ids; whether it did not fail. It may in any way on tensors
    without values."""
    device = next(model.parameters()).device
    with contextlib.suppress(Exception), torch.no_grad(), AnyScalar():
        run(model, torch.ones(1, 8, dtype=torch.long, device=device))
        return True
    return False


def _counting(calls: list[str], parts: int) -> Callable[[str, Forward], Forward]:
    def make(path: str, original: Forward) -> Forward:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(path)
            try:
                return original(*args, **kwargs)
            except Exception:  # routing experts looks at values
                hidden = hidden_argument(args, kwargs)
                return (hidden, *[None] * (parts - 1)) if parts else hidden

        return call

    return make


class Stop(Exception):
    """Raised by a recorder to end a forward pass early."""


@contextlib.contextmanager
def replaced_forward(modules: Mapping[Key, nn.Module], make: Callable[[Key, Forward], Forward]) -> Iterator[None]:
    """Give each module another forward for a while: `make(key, original)`."""
    own: dict[Key, Any] = {key: module.__dict__.get("forward") for key, module in modules.items()}
    for key, module in modules.items():
        module.forward = make(key, module.forward)
    try:
        yield
    finally:
        for key, module in modules.items():
            del module.forward
            if own[key] is not None:  # another library's, on this module alone
                module.forward = own[key]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise CalibrationError(f"A block returned {type(found).__name__} where hidden states (a tensor) were expected.")
    return found


def first_input(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
    """What a layer is called with, also by keyword: `self.fc(input=x)`. For hooks with kwargs."""
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    assert found is not None, "a linear layer is called with a tensor"
    return found


def hidden_argument(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
    """The hidden states that a block is called with: by name, else the first numbers among its arguments and the parts
    of these (masks of bools and positions are none)."""
    named = kwargs.get("hidden_states")
    if not args and isinstance(named, Tensor):
        return named
    found = next((tensor for _, tensor in tensors((*args, *kwargs.values())) if tensor.dtype.is_floating_point), None)
    if found is None:
        raise CalibrationError("A block was called without hidden states (a floating-point tensor).")
    return found
