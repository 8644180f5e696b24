"""Run the calibration windows through a model block by block and collect the moments of each layer's input.

Only one block's Gram matrices exist at a time. The blocks are found structurally (the longest ModuleList of modules of
one class), never by architecture name. Every block's own keyword arguments (masks, position embeddings, which may
differ between blocks) are recorded once, in a pass in which blocks hand their input on without computing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, LordWarning
from .moments import MomentAccumulator, Moments


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model; without a block list, the model itself as the only 'block'."""

    prefix: str  # module path of the list, "" when the whole model is the block
    modules: tuple[nn.Module, ...]

    def names(self) -> list[str]:
        return [f"{self.prefix}.{i}" if self.prefix else "" for i in range(len(self.modules))]


def find_blocks(model: nn.Module) -> Blocks:
    """The longest ModuleList whose members are of one class (the outermost on a tie)."""
    best = Blocks("", (model,))
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        if not best.prefix or len(module) > len(best.modules):
            best = Blocks(name, tuple(module))
    if not best.prefix:
        warnings.warn(
            "The model has no list of repeated blocks; all layers are calibrated in one pass, which holds every "
            "Gram matrix in memory at once.",
            LordWarning,
            stacklevel=2,
        )
    return best


class _Stop(Exception):
    """Raised by a recorder to end a forward pass early."""


@contextmanager
def _replaced_forward(modules: dict[int, nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    for index, module in modules.items():
        module.forward = make(index, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


class BlockWalk:
    """Hidden states of several streams of windows (calibration, held-out), carried from block to block.

    All windows have one shape (1, length), so the recorded keyword arguments fit every window.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        streams: dict[str, Tensor],  # name -> (window, length) token ids
        forward: Callable[[nn.Module, Tensor], Any],  # runs the model on (1, length) ids
    ):
        self._blocks, self._streams, self._forward, self._model = blocks, streams, forward, model
        self._calls: list[tuple[tuple, dict]] = []
        self._hidden: dict[str, list[Tensor]] = {}
        if blocks.prefix:
            self._record_calls(next(iter(streams.values()))[:1])
            self._hidden = {name: [self._first_input(w[None]) for w in windows] for name, windows in streams.items()}

    @torch.no_grad()
    def _record_calls(self, window: Tensor) -> None:
        calls: dict[int, tuple[tuple, dict]] = {}
        last = len(self._blocks.modules) - 1
        wrap: list[Callable[[Tensor], Any]] = []

        def make(index: int, original: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                if index in calls:
                    raise CalibrationError(
                        "A block of this model runs more than once in a forward pass; such models are not supported."
                    )
                calls[index] = (args, kwargs)
                if index == last:
                    raise _Stop
                hidden = args[0] if args else kwargs["hidden_states"]
                if not wrap:  # the first block runs for real, to learn the form of a block's output
                    output = original(*args, **kwargs)
                    rest = output[1:] if isinstance(output, tuple | list) else None
                    wrap.append(lambda h: h if rest is None else (h, *rest))
                return wrap[0](hidden)

            return record

        with _replaced_forward(dict(enumerate(self._blocks.modules)), make):
            try:
                self._forward(self._model, window)
            except _Stop:
                pass
        for index in range(last + 1):
            if index not in calls:
                raise CalibrationError(f"Block {self._blocks.names()[index]} never ran in a forward pass of the model.")
            args, kwargs = calls[index]
            if args:
                self._calls.append((args[1:], kwargs))
            else:
                self._calls.append(((), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    @torch.no_grad()
    def _first_input(self, window: Tensor) -> Tensor:
        found: list[Tensor] = []

        def make(index: int, original: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                found.append(args[0] if args else kwargs["hidden_states"])
                raise _Stop

            return record

        with _replaced_forward({0: self._blocks.modules[0]}, make):
            try:
                self._forward(self._model, window)
            except _Stop:
                pass
        return found[0]

    def _run(self, index: int, stream: str, position: int) -> None:
        if not self._blocks.prefix:
            self._forward(self._model, self._streams[stream][position][None])
            return
        args, kwargs = self._calls[index]
        output = self._blocks.modules[index](self._hidden[stream][position], *args, **kwargs)
        self._hidden[stream][position] = _hidden_of(output)

    @torch.no_grad()
    def collect(self, index: int, layers: dict[str, nn.Module]) -> dict[str, dict[str, Moments]]:
        """Run block `index` over all windows and return stream -> layer name -> moments of its input.

        Layers fed by the same tensor (q, k, v; gate, up) share one record. A layer that never ran is absent.
        """
        return {stream: self._collect_stream(index, stream, layers) for stream in self._streams}

    def _collect_stream(self, index: int, stream: str, layers: dict[str, nn.Module]) -> dict[str, Moments]:
        sums: dict[str, MomentAccumulator] = {}
        leader: dict[str, str] = {}
        seen: list[tuple[str, Tensor]] = []  # the distinct inputs of the window in flight

        def hook(name: str) -> Callable:
            def observe(module: nn.Module, args: tuple) -> None:
                x = args[0]
                first = next((n for n, t in seen if t is x), None)
                if first is not None and leader.setdefault(name, first) == first:
                    return
                if leader.setdefault(name, name) != name:
                    raise CalibrationError(f"The layers that share the input of '{name}' changed between windows.")
                seen.append((name, x))
                sums.setdefault(name, MomentAccumulator(x.shape[-1], x.device)).update(x)

            return observe

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
        try:
            for position in range(len(self._streams[stream])):
                seen.clear()
                self._run(index, stream, position)
        finally:
            seen.clear()
            for handle in handles:
                handle.remove()
        results = {name: accumulator.result(name) for name, accumulator in sums.items()}
        return {name: results[leader[name]] for name in layers if name in leader}
