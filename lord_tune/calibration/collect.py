"""Run windows of text through a model block by block and collect statistics of each layer's input.

Only one block's weights and Gram matrices exist at a time; the hidden states between blocks lie in files. The blocks
are found by what a forward pass runs, never by architecture name (blocks.py). A model whose blocks only hand their
states on is walked from file to file (handed.py); any other by its own forward, which is answered with the outputs of
earlier blocks (replay.py). `start` finds out which, on every window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..parallel import Workers
from .blocks import Blocks, Run, first_input
from .handed import HandedOn, NotHandedOn
from .moments import InputStatistics, MomentAccumulator, Moments, Sample, SampleAccumulator
from .replay import Replayed
from .route import Answer, Ask, Ground, Loss, Route, Score

Slot = tuple[str, int]  # an input: the layer that is given it first, and which of that layer's calls it is
Accumulator = MomentAccumulator | SampleAccumulator


class BlockWalk:
    """Several streams of windows (calibration, held-out, ...), carried from block to block.

    All windows of a stream have one shape (1, length). `start` and `resume` need the parts of the model outside the
    blocks in memory (but for the output head) and block 0; afterwards only the block at hand is needed, and, where
    `whole_forward` says so, the parts outside the blocks. Each process walks its own share of every stream.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        streams: dict[str, Tensor],  # name -> (window, length) token ids of all processes
        forward: Run,  # runs the model on (1, length) ids
        folder: Path,
        workers: Workers | None = None,
        alike: bool = False,  # a process gets the same windows of all streams, which are one text
    ):
        self._alike = alike
        self._blocks, self._model, self._forward = blocks, model, forward
        self._workers = workers or Workers()
        self._tokens = {name: windows.numel() for name, windows in streams.items()}
        examples = {name: windows[:1] for name, windows in streams.items()}
        self._ground = Ground(model, blocks, forward, folder, self._workers.rank, examples)
        self._route: Route = HandedOn(self._ground)
        self.windows = self._ground.windows
        for name, windows in streams.items():
            self.hand_out(name, windows)

    def share(self, stream: str, windows: Tensor) -> Tensor:
        """This process's part of a stream's windows (or of what belongs to them, one entry each)."""
        # every other stream is dealt from the other end, so that one process does not get every odd window
        odd = not self._alike and [*self._tokens].index(stream) % 2
        first = self._workers.size - 1 - self._workers.rank if odd else self._workers.rank
        return windows[first :: self._workers.size]

    def hand_out(self, stream: str, windows: Tensor) -> None:
        """Let the token ids of a stream be these, of all processes; the states in the files are not touched."""
        assert windows.numel() == self._tokens[stream], "as many windows as there are states"
        self.windows[stream] = self.share(stream, windows)

    @property
    def streamed(self) -> bool:
        """False when the model has no blocks and is run whole."""
        return not self._blocks.whole

    @property
    def whole_forward(self) -> bool:
        """Whether the parts outside the blocks have to stay in memory; known after `start`."""
        return self.streamed and self._route.whole_forward

    def start(self) -> str:
        """Write what block 0 needs; returns why the model's own forward is followed, "" where blocks hand on."""
        if not self.streamed:
            return ""
        try:
            self._route.start()
            reason = ""
        except NotHandedOn as found:
            reason = str(found)
        reason = next((r for r in self._workers.gather(reason) if r), "")
        if reason:
            self._route = Replayed(self._ground)
        return reason

    def resume(self, reason: str) -> None:
        """Take up a walk that an earlier process started; `reason` is what its `start` returned."""
        if self.streamed:
            self._route = Replayed(self._ground) if reason else self._route
            self._route.resume()

    def forget(self, index: int, streams: list[str]) -> None:
        """Remove what only the blocks before `index` needed, the input of block `index` included."""
        for stream in streams:
            self._route.forget(index, stream)

    def forget_gradients(self, index: int, stream: str) -> None:
        """Remove what only the way back from the blocks after `index` needed."""
        self._route.forget_gradients(index, stream)

    def output(self, index: int, stream: str, position: int) -> Tensor:
        """The output (1, length, width) of block `index` for one window, computed from its stored input."""
        return self._route.output(index, stream, position)

    def stored_output(self, index: int, stream: str, position: int) -> Tensor:
        """The output of block `index` for one window as `advance` wrote it."""
        return self._route.stored_output(index, stream, position)

    def result(self, stream: str, position: int) -> object:
        """What the model returns for a window, from the stored outputs. Needs all parts outside the blocks."""
        return self._route.result(stream, position)

    @torch.no_grad()
    def advance(self, index: int, stream: str, keep: bool = True) -> None:
        """Run block `index` over a stream; `keep` writes what comes out."""
        if self.streamed:
            self._route.advance(index, stream, keep)
        else:
            for window in self.windows[stream]:
                self._forward(self._model, window[None])

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
        sums: dict[Slot, Accumulator] = {}
        slots: dict[str, list[Slot]] = {}  # layer -> its inputs, in the order of its calls in a forward pass
        seen: list[tuple[Slot, Tensor]] = []  # the distinct inputs of the window in flight
        calls: dict[str, int] = {}  # layer -> how often it ran in the window in flight

        def accumulator(width: int, device: torch.device) -> Accumulator:
            # rows are float32, a Gram matrix is float64
            if sampled and self._tokens[stream] <= 2 * width:
                return SampleAccumulator(width, device)
            return MomentAccumulator(width, device)

        def hook(name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
            def observe(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                x = first_input(args, kwargs)
                number = calls.get(name, 0)
                calls[name] = number + 1
                slot = next((s for s, t in seen if t is x), None)
                new = slot is None
                slot = slot or (name, number)
                own = slots.setdefault(name, [])
                if number == len(own):
                    own.append(slot)
                elif own[number] != slot:
                    raise CalibrationError(f"The layers that share the input of '{name}' changed between windows.")
                if new:
                    seen.append((slot, x))
                    if slot not in sums:
                        sums[slot] = accumulator(x.shape[-1], x.device)
                    sums[slot].update(x)

            return observe

        def begin(module: nn.Module, args: tuple[object, ...]) -> None:
            # the windows of one forward pass share tensors, those of the next do not
            seen.clear()
            calls.clear()

        handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
        handles.append(self._model.register_forward_pre_hook(begin))
        block = self._blocks.modules[index]
        if self._blocks.runs(index) == 1 and block is not self._model:
            handles.append(block.register_forward_pre_hook(begin))
        try:
            self.advance(index, stream, keep)
        finally:
            seen.clear()
            for handle in handles:
                handle.remove()
        device = next(iter(block.parameters())).device
        self._agree(sums, slots, lambda width: accumulator(width, device))
        results = {slot: sums[slot].result(slot[0], self._workers) for slot in sorted(sums)}
        joined: dict[tuple[Slot, ...], InputStatistics] = {}
        readers = Counter(tuple(own) for own in slots.values())
        for own, count in readers.items():
            record = _joined([results[slot] for slot in own])
            joined[own] = replace(record, readers=count) if isinstance(record, Moments) else record
        return {name: joined[tuple(slots[name])] for name in layers if name in slots}

    def _agree(
        self, sums: dict[Slot, Accumulator], slots: dict[str, list[Slot]], accumulator: Callable[[int], Accumulator]
    ) -> None:
        """Make every process know every layer that ran on any of them, so that all add up the same sums."""
        for other_slots, widths in self._workers.gather((slots, {slot: s.width for slot, s in sums.items()})):
            for name, theirs in other_slots.items():
                own = slots.setdefault(name, [])
                if any(a != b for a, b in zip(own, theirs, strict=False)):
                    raise CalibrationError(f"The layers that share the input of '{name}' differ between processes.")
                own.extend(theirs[len(own) :])
            for slot, width in widths.items():
                if slot not in sums:
                    sums[slot] = accumulator(width)

    def scores(self, stream: str, score: Score) -> list[tuple[float, int]]:
        """(loss, tokens) of this process's windows, from the stored outputs. Needs all parts outside the blocks."""
        return [(float(loss), count) for loss, count in self.answers(stream, score)]

    def answers(self, stream: str, ask: Ask[Answer]) -> Iterator[Answer]:
        """What `ask` finds of each of this process's windows, one after the other. Needs all parts outside the
        blocks."""
        return self._route.answers(stream, ask)

    # --- the way back: gradients of the loss, from the last block to the first ---

    def write_gradients(self, stream: str, loss: Loss) -> None:
        """Gradients of the loss by the blocks' outputs. Needs all parts outside the blocks in memory."""
        self._route.write_gradients(stream, loss)

    def backward(self, index: int, stream: str) -> None:
        """Recompute block `index` with gradients and write those of its input; hooks on its layers see theirs."""
        self._route.backward(index, stream)


def _joined(parts: list[Moments | Sample]) -> InputStatistics:
    """Of a layer with these inputs."""
    if len(parts) == 1:
        return parts[0]
    moments = [part for part in parts if isinstance(part, Moments)]
    return Moments.joined(moments) if moments else Sample.joined([p for p in parts if isinstance(p, Sample)])
