"""Blocks that hand their hidden states on, and nothing else: most decoders and encoders.

Then the only thing that differs between windows is one tensor per block. All other arguments (masks, position
embeddings, which may differ between blocks) are recorded once per stream. That this is so is checked for every window
before the first block runs: a forward pass in which blocks hand their input on without computing must call each block
once, in order, with the very tensor that the one before it returned, and with the arguments of the first window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import LordError
from ..kept import Kept
from .blocks import AnyScalar, Blocks, Forward, Run, Stop, hidden_argument, hidden_of, replaced_forward
from .route import Answer, Ask, Ground, Loss
from .states import StateFile, StateWriter
from .trees import mapped, same, tensors

Call = tuple[tuple[object, ...], dict[str, object]]  # arguments without the hidden states


_REPEATED = "a block runs more than once"
_DIFFERENT = "arguments of its blocks differ between windows"


class NotHandedOn(Exception):
    """The model does more between its blocks than to hand their outputs on; the message says what."""


@dataclass
class _Watch:
    """A forward pass in which every block hands its input on."""

    calls: list[Call] = field(default_factory=list)
    first: Tensor | None = None  # the input of block 0
    expected: Tensor | None = None  # what the block before returned


class HandedOn:
    """The route for such models; raises NotHandedOn from `start` for others."""

    whole_forward = False

    def __init__(self, ground: Ground):
        self._ground, self._blocks = ground, ground.blocks
        self._calls: dict[str, list[Call]] = {}
        self._rest: tuple[object, ...] | None = None  # what a block returns after the hidden states; None: no tuple

    def _wrap(self, hidden: Tensor) -> object:
        return hidden if self._rest is None else (hidden, *(mapped(part, _untouched) for part in self._rest))

    @torch.no_grad()
    def resume(self) -> None:
        for stream, window in self._ground.examples.items():
            self._calls[stream] = self.watched(window, learn=True).calls

    @torch.no_grad()
    def start(self) -> None:
        if any(self._blocks.runs(index) > 1 for index in range(len(self._blocks.modules))):
            raise NotHandedOn(_REPEATED)
        self.resume()
        for stream, windows in self._ground.windows.items():
            with StateWriter(self._ground.file("states", stream, 0)) as target:
                for window in windows:
                    found = self.watched(window[None])
                    if not same(found.calls, self._calls[stream]):
                        raise NotHandedOn(_DIFFERENT)
                    assert found.first is not None
                    target.append(found.first)

    def watched(self, window: Tensor, learn: bool = False) -> _Watch:
        """With `learn`, block 0 runs for real, to know the form of a block's output."""
        watch = _Watch()
        last = len(self._blocks.modules) - 1

        def make(index: int, original: Forward) -> Forward:
            def call(*args: object, **kwargs: object) -> object:
                hidden = hidden_argument(args, kwargs)
                if not any(value is hidden for value in (*args, *kwargs.values())):
                    raise NotHandedOn("a block gets its hidden states inside a tuple or list")
                if index != len(watch.calls):
                    raise NotHandedOn("its blocks do not run once each, in order")
                if index == 0:
                    watch.first = hidden
                    if learn:
                        self._learn(original(*args, **kwargs))
                elif hidden is not watch.expected:
                    raise NotHandedOn(f"the input of {self._blocks.paths[index]} is not the output of the block before")
                if any(isinstance(tensor, Kept) for _, tensor in tensors([args, kwargs])):
                    raise NotHandedOn("a block is given more of what the one before returned than its hidden states")
                watch.calls.append(_without(hidden, args, kwargs))
                if index == last:
                    raise Stop
                watch.expected = hidden.detach()  # another object: later blocks may be given earlier states as well
                return self._wrap(watch.expected)

            return call

        with replaced_forward(dict(enumerate(self._blocks.modules)), make):
            try:
                self._ground.forward(self._ground.model, window)
            except (Stop, NotHandedOn, LordError, torch.OutOfMemoryError) as found:
                if not isinstance(found, Stop):
                    raise
            except Exception as error:  # the model may need more of its blocks, in any way
                raise NotHandedOn(f"it fails when blocks hand on their input ({error})") from error
        if len(watch.calls) != last + 1:
            raise NotHandedOn(f"{self._blocks.paths[len(watch.calls)]} did not run")
        return watch

    def _learn(self, output: object) -> None:
        self._rest = None
        if isinstance(output, tuple | list):
            self._rest = tuple(
                mapped(part, lambda tensor: torch.empty_like(tensor, device="meta")) for part in output[1:]
            )
        elif not isinstance(output, Tensor):
            raise NotHandedOn(f"its blocks return {type(output).__name__}")

    def _block(self, index: int, stream: str, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[stream][index]
        return hidden_of(self._blocks.modules[index](*_filled(args, hidden), **_filled_names(kwargs, hidden)))

    def output(self, index: int, stream: str, position: int) -> Tensor:
        return self._block(index, stream, self._state(index, stream, position).to(self._ground.device(index)))

    def stored_output(self, index: int, stream: str, position: int) -> Tensor:
        return self._state(index + 1, stream, position)

    def _state(self, index: int, stream: str, position: int) -> Tensor:
        """The hidden states (1, length, width) of one window in front of block `index`."""
        source = StateFile(self._ground.file("states", stream, index))
        hidden = source[position]
        source.close()
        return hidden

    @torch.no_grad()
    def advance(self, index: int, stream: str, keep: bool) -> None:
        source = StateFile(self._ground.file("states", stream, index))
        device = self._ground.device(index)
        if not keep:
            for hidden in source.on(device):
                self._block(index, stream, hidden)
        else:
            with StateWriter(self._ground.file("states", stream, index + 1)) as target:
                for hidden in source.on(device):
                    target.append(self._block(index, stream, hidden))
        source.close()

    @contextmanager
    def _ending_with(self, hidden: Tensor) -> Iterator[None]:
        """Forward passes in which the last block returns `hidden`."""
        last = len(self._blocks.modules) - 1

        def make(index: int, original: Forward) -> Forward:
            def skip(*args: object, **kwargs: object) -> object:
                return self._wrap(hidden if index == last else hidden_argument(args, kwargs))

            return skip

        with replaced_forward(dict(enumerate(self._blocks.modules)), make):
            yield

    @torch.no_grad()
    def result(self, stream: str, position: int) -> object:
        window = self._ground.windows[stream][position]
        hidden = self._state(len(self._blocks.modules), stream, position)
        with self._ending_with(hidden.to(self._ground.device_outside())):
            return self._ground.forward(self._ground.model, window[None])

    def answers(self, stream: str, ask: Ask[Answer]) -> Iterator[Answer]:
        for position, window in enumerate(self._ground.windows[stream]):
            hidden = self._state(len(self._blocks.modules), stream, position)
            with torch.no_grad(), self._ending_with(hidden.to(self._ground.device_outside())):
                found = ask(self._ground.model, window[None])
            yield found

    def write_gradients(self, stream: str, loss: Loss) -> None:
        last = len(self._blocks.modules)
        source = StateFile(self._ground.file("states", stream, last))
        with StateWriter(self._ground.file("gradients", stream, last)) as target:
            for window, hidden in zip(
                self._ground.windows[stream], source.on(self._ground.device_outside()), strict=True
            ):
                leaf = hidden.requires_grad_(True)
                with self._ending_with(leaf), torch.enable_grad():
                    loss(self._ground.model, window[None]).backward()
                assert leaf.grad is not None, "the loss depends on the last block"
                target.append(leaf.grad)
        source.close()

    def backward(self, index: int, stream: str) -> None:
        device = self._ground.device(index)
        states = StateFile(self._ground.file("states", stream, index))
        above = StateFile(self._ground.file("gradients", stream, index + 1))
        with StateWriter(self._ground.file("gradients", stream, index)) as target:
            for hidden, gradient in zip(states.on(device), above.on(device), strict=True):
                leaf = hidden.requires_grad_(True)
                with torch.enable_grad():
                    torch.autograd.backward(self._block(index, stream, leaf), gradient)
                assert leaf.grad is not None, "a block's output depends on its input"
                target.append(leaf.grad)
        states.close()
        above.close()

    def forget(self, index: int, stream: str) -> None:
        self._ground.file("states", stream, index).unlink(missing_ok=True)

    def forget_gradients(self, index: int, stream: str) -> None:
        for kind in ("states", "gradients"):
            self._ground.file(kind, stream, index + 2).unlink(missing_ok=True)


def _untouched(form: Tensor) -> Tensor:
    """For what blocks return beside their hidden states (attention weights) and nobody may use."""

    def read() -> Tensor:
        raise NotHandedOn("more of what its blocks return is used than their hidden states")

    return Kept(form.shape, form.dtype, form.device, read)


_HIDDEN = object()  # where the hidden states stood among the arguments


def _without(hidden: Tensor, args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    return tuple(_HIDDEN if a is hidden else a for a in args), {
        key: _HIDDEN if value is hidden else value for key, value in kwargs.items()
    }


def _filled(args: Sequence[object], hidden: Tensor) -> list[object]:
    return [hidden if a is _HIDDEN else a for a in args]


def _filled_names(kwargs: Mapping[str, object], hidden: Tensor) -> dict[str, object]:
    return {key: hidden if value is _HIDDEN else value for key, value in kwargs.items()}


def foreseen(model: nn.Module, blocks: Blocks, run: Run) -> str:
    """What HandedOn will refuse of a model, as far as a pass tells in which tensors may have no values (a skeleton on
    the meta device); "" where nothing is seen."""
    if any(blocks.runs(index) > 1 for index in range(len(blocks.modules))):
        return _REPEATED
    route = HandedOn(Ground(model, blocks, run, Path(), 0, {}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.ones(1, 8, dtype=torch.long, device=next(model.parameters()).device)

    def follow(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:  # the text, by its gradient
        given = args[0] if args else None
        told = isinstance(given, Tensor) and given.shape == ids.shape
        return output.detach().requires_grad_(True) if told else output

    hooks = [m.register_forward_hook(follow) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model.requires_grad_(False)
        with torch.enable_grad(), AnyScalar():
            calls = route.watched(ids, learn=True).calls
    except NotHandedOn as found:
        return "" if found.__cause__ is not None else str(found)  # computing without values may fail in any way
    except Exception:  # in block 0
        return ""
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    told = any(tensor.requires_grad or tensor is ids for _, tensor in tensors(calls))
    return _DIFFERENT if told else ""
