"""Run windows of text through a model block by block and collect statistics of each layer's input.

Only one block's weights and Gram matrices exist at a time; the hidden states between blocks lie in files. The blocks
are found structurally (the longest ModuleList of modules of one class), never by architecture name. Every block's own
keyword arguments (masks, position embeddings, which may differ between blocks) are recorded once per stream, in a pass
in which blocks hand their input on without computing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..parallel import Workers
from .blocks import Blocks, Stop, first_input, hidden_argument, hidden_of, replaced_forward
from .moments import InputStatistics, MomentAccumulator, SampleAccumulator
from .states import StateFile, StateWriter


class BlockWalk:
    """Hidden states of several streams of windows (calibration, held-out, ...), carried from block to block.

    All windows of a stream have one shape (1, length), so the keyword arguments recorded on its first window fit every
    window. `record` and `start` need the parts of the model outside the blocks in memory, and block 0; afterwards only
    the block at hand is needed. Each process walks its own share of every stream.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        streams: dict[str, Tensor],  # name -> (window, length) token ids of all processes
        forward: Callable[[nn.Module, Tensor], Any],  # runs the model on (1, length) ids
        folder: Path,
        workers: Workers | None = None,
    ):
        self._blocks, self._model, self._forward, self._folder = blocks, model, forward, folder
        self._workers = workers or Workers()
        self._tokens = {name: windows.numel() for name, windows in streams.items()}
        self._examples = {name: windows[:1] for name, windows in streams.items()}
        self._positions = {name: position for position, name in enumerate(streams)}
        self.windows = {name: self.share(name, windows) for name, windows in streams.items()}
        self._calls: dict[str, list[tuple[tuple, dict]]] = {}
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden

    def share(self, stream: str, windows: Tensor) -> Tensor:
        """This process's part of a stream's windows, or of what belongs to them. Every other stream is dealt from the
        other end, so that one process does not get every odd window."""
        size, rank = self._workers.size, self._workers.rank
        first = size - 1 - rank if self._positions[stream] % 2 else rank
        return windows[first::size]

    def hand_out(self, stream: str, windows: Tensor) -> None:
        """Take other token ids for a stream whose states are written: those that the loss starts from."""
        assert windows.numel() == self._tokens[stream], "as many windows as there are states"
        self.windows[stream] = self.share(stream, windows)

    @property
    def streamed(self) -> bool:
        """False when the model has no blocks and is run whole."""
        return bool(self._blocks.prefix)

    @torch.no_grad()
    def record(self) -> None:
        """Learn every block's arguments; runs one window of each stream through everything but the blocks."""
        if self.streamed:
            for stream, window in self._examples.items():
                self._calls[stream] = self._record_calls(window)

    def _record_calls(self, window: Tensor) -> list[tuple[tuple, dict]]:
        calls: dict[int, tuple[tuple, dict]] = {}
        last = len(self._blocks.modules) - 1
        learnt: list[Any] = []

        def make(index: int, original: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                if index in calls:
                    raise CalibrationError(
                        "A block of this model runs more than once in a forward pass; such models are not supported."
                    )
                calls[index] = (args, kwargs)
                if not learnt:  # the first block runs for real, to learn the form of a block's output
                    learnt.append(original(*args, **kwargs))
                    self._learn_form(learnt[0])
                if index == last:
                    raise Stop
                return self._wrap(hidden_argument(args, kwargs))

            return record

        with replaced_forward(dict(enumerate(self._blocks.modules)), make):
            try:
                self._forward(self._model, window)
            except Stop:
                pass
        found = []
        for index in range(last + 1):
            if index not in calls:
                raise CalibrationError(f"Block {self._blocks.names()[index]} never ran in a forward pass of the model.")
            args, kwargs = calls[index]
            rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            found.append((args[1:], rest))
        return found

    def _learn_form(self, output: Any) -> None:
        if isinstance(output, tuple | list):
            rest = tuple(output[1:])
            self._wrap = lambda hidden: (hidden, *rest)

    def _file(self, index: int, stream: str, kind: str = "states") -> Path:
        return self._folder / f"{kind}-{stream}-{index:05d}-{self._workers.rank}.bin"

    @torch.no_grad()
    def start(self) -> None:
        """Write the inputs of block 0."""
        if not self.streamed:
            return
        for stream, windows in self.windows.items():
            with StateWriter(self._file(0, stream)) as target:
                for window in windows:
                    target.append(self._first_input(window[None]))

    def _first_input(self, window: Tensor) -> Tensor:
        found: list[Tensor] = []

        def make(index: int, original: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                found.append(hidden_argument(args, kwargs))
                raise Stop

            return record

        with replaced_forward({0: self._blocks.modules[0]}, make):
            try:
                self._forward(self._model, window)
            except Stop:
                pass
        return found[0]

    def forget(self, index: int, streams: list[str], kind: str = "states") -> None:
        """Remove the states in front of block `index`."""
        for stream in streams:
            self._file(index, stream, kind).unlink(missing_ok=True)

    def block(self, index: int, stream: str, hidden: Tensor) -> Tensor:
        """The output of block `index` for the hidden states (1, length, width) in front of it."""
        args, kwargs = self._calls[stream][index]
        return hidden_of(self._blocks.modules[index](hidden, *args, **kwargs))

    def state(self, index: int, stream: str, position: int) -> Tensor:
        """The hidden states (1, length, width) of one window in front of block `index`."""
        source = StateFile(self._file(index, stream))
        hidden = source[position]
        source.close()
        return hidden

    @torch.no_grad()
    def advance(self, index: int, stream: str, keep: bool = True) -> None:
        """Run block `index` over a stream; `keep` writes what comes out."""
        if not self.streamed:
            for window in self.windows[stream]:
                self._forward(self._model, window[None])
            return
        device = next(iter(self._blocks.modules[index].parameters())).device
        source = StateFile(self._file(index, stream))
        if not keep:
            for hidden in source.on(device):
                self.block(index, stream, hidden)
        else:
            with StateWriter(self._file(index + 1, stream)) as target:
                for hidden in source.on(device):
                    target.append(self.block(index, stream, hidden))
        source.close()

    def collect(
        self,
        index: int,
        layers: dict[str, nn.Module],
        keep: bool = True,  # write the outputs of the block
        sampled: tuple[str, ...] = (),  # streams that are only measured on: their rows are kept where that is smaller
        streams: tuple[str, ...] = ("calibration", "heldout"),
    ) -> dict[str, dict[str, InputStatistics]]:
        """Run block `index` over the streams and return stream -> layer name -> statistics of its input.

        Layers fed by the same tensor (q, k, v; gate, up) share one record. A layer that never ran is absent.
        """
        found = {}
        for stream in streams:
            if stream in self.windows:
                found[stream] = self._collect_stream(index, stream, layers, keep, stream in sampled)
        return found

    def _collect_stream(
        self, index: int, stream: str, layers: dict[str, nn.Module], keep: bool, sampled: bool
    ) -> dict[str, InputStatistics]:
        sums: dict[str, MomentAccumulator | SampleAccumulator] = {}
        leader: dict[str, str] = {}
        seen: list[tuple[str, Tensor]] = []  # the distinct inputs of the window in flight

        def accumulator(width: int, device: torch.device) -> MomentAccumulator | SampleAccumulator:
            # rows are float32, a Gram matrix is float64
            if sampled and self._tokens[stream] <= 2 * width:
                return SampleAccumulator(width, device)
            return MomentAccumulator(width, device)

        def hook(name: str) -> Callable:
            def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = first_input(args, kwargs)
                first = next((n for n, t in seen if t is x), None)
                if first is None:
                    seen.append((name, x))
                if leader.setdefault(name, first or name) != (first or name):
                    raise CalibrationError(f"The layers that share the input of '{name}' changed between windows.")
                if first is None:
                    if name not in sums:
                        sums[name] = accumulator(x.shape[-1], x.device)
                    sums[name].update(x)

            return observe

        handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
        block = self._blocks.modules[index]
        # the windows of one forward pass share tensors, those of the next do not
        handles.append(block.register_forward_pre_hook(lambda module, args: seen.clear()))
        try:
            self.advance(index, stream, keep)
        finally:
            seen.clear()
            for handle in handles:
                handle.remove()
        device = next(iter(block.parameters())).device
        self._agree(sums, leader, lambda width: accumulator(width, device))
        results = {name: sums[name].result(name, self._workers) for name in sorted(sums)}
        return {name: results[leader[name]] for name in layers if name in leader}

    def _agree(self, sums: dict, leader: dict[str, str], accumulator: Callable) -> None:
        """Make every process know every layer that ran on any of them, so that all add up the same sums."""
        for other_leader, widths in self._workers.gather((leader, {name: s.width for name, s in sums.items()})):
            for name, first in other_leader.items():
                if leader.setdefault(name, first) != first:
                    raise CalibrationError(f"The layers that share the input of '{name}' differ between processes.")
            for name, width in widths.items():
                if name not in sums:
                    sums[name] = accumulator(width)

    # --- the way back: gradients of the loss, from the last block to the first ---

    def write_gradients(self, stream: str, loss: Callable[[nn.Module, Tensor], Tensor], device: torch.device) -> None:
        """Gradients of the loss at the output of the last block. Needs the parts outside the blocks in memory."""
        last = len(self._blocks.modules) - 1
        source = StateFile(self._file(last + 1, stream))
        with StateWriter(self._file(last + 1, stream, "gradients")) as target:
            for window, hidden in zip(self.windows[stream], source.on(device), strict=True):
                leaf = hidden.requires_grad_(True)

                def make(index: int, original: Callable, leaf: Tensor = leaf) -> Callable:
                    def skip(*args: Any, **kwargs: Any) -> Any:
                        return self._wrap(leaf if index == last else hidden_argument(args, kwargs))

                    return skip

                with replaced_forward(dict(enumerate(self._blocks.modules)), make), torch.enable_grad():
                    loss(self._model, window[None]).backward()
                assert leaf.grad is not None, "the loss depends on the last block"
                target.append(leaf.grad)
        source.close()

    def backward(self, index: int, stream: str) -> None:
        """Recompute block `index` with gradients and write those of its input; hooks on its layers see theirs."""
        device = next(iter(self._blocks.modules[index].parameters())).device
        states = StateFile(self._file(index, stream))
        above = StateFile(self._file(index + 1, stream, "gradients"))
        with StateWriter(self._file(index, stream, "gradients")) as target:
            for hidden, gradient in zip(states.on(device), above.on(device), strict=True):
                leaf = hidden.requires_grad_(True)
                with torch.enable_grad():
                    torch.autograd.backward(self.block(index, stream, leaf), gradient)
                assert leaf.grad is not None, "a block's output depends on its input"
                target.append(leaf.grad)
        states.close()
        above.close()
