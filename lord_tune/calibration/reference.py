"""What a model's blocks and the model itself return in an ordinary forward pass: what every walk is compared with.

The pass is the model's own, whole and uninterrupted; the only difference is that the weights of a block are loaded when
it is called and released when the next one is. A walk that agrees with it to rounding has given every block the inputs
that the model gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .blocks import Blocks, Forward, hidden_of, replaced_forward
from .collect import BlockWalk
from .states import StateFile, StateWriter
from .task import Task

# largest relative difference: the same operations on the same inputs, but an accelerator may add in another order, and
# what it rounds differently grows from block to block
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Reference:
    """Outputs of one window in an ordinary forward pass, in files."""

    def __init__(self, model: nn.Module, blocks: Blocks, task: Task, folder: Path):
        self._model, self._blocks, self._task, self._folder = model, blocks, task, folder

    def _file(self, index: int, number: int = 0) -> Path:
        return self._folder / f"reference-{index:05d}.{number}.bin"

    @torch.no_grad()
    def write(self, window: Tensor, load: Callable[[int], object]) -> None:
        """`load(i)` brings block i into memory, and, with the number of blocks, what comes after them; what it brought
        before may stay or go. Other parts outside the blocks are in memory."""
        last = len(self._blocks.modules) - 1
        calls = [0] * (last + 1)

        def make(index: int, original: Forward) -> Forward:
            def call(*args: object, **kwargs: object) -> object:
                if calls[index] == 0:
                    load(index)
                calls[index] += 1
                output = original(*args, **kwargs)
                if calls[index] == self._blocks.runs(index):
                    self._keep(index, [hidden_of(output)])
                    if index == last:
                        load(last + 1)
                return output

            return call

        with replaced_forward(dict(enumerate(self._blocks.modules)), make):
            self._keep(last + 1, self._task.outputs(self._task.forward(self._model, window)))

    def _keep(self, index: int, tensors: list[Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            with StateWriter(self._file(index, number)) as target:
                target.append(tensor)

    def of_block(self, walk: BlockWalk, index: int, stream: str) -> str | None:
        """What is wrong with the walk's output of block `index`, None where nothing is."""
        found = walk.stored_output(index, stream, 0)
        return self._compared(index, 0, found, f"the output of {self._blocks.paths[index]}")

    def of_result(self, walk: BlockWalk, stream: str) -> str | None:
        """The same of what the model returns."""
        for number, found in enumerate(self._task.outputs(walk.result(stream, 0))):
            problem = self._compared(len(self._blocks.modules), number, found, "what the model returns")
            if problem is not None:
                return problem
        return None

    def _compared(self, index: int, number: int, found: Tensor, what: str) -> str | None:
        source = StateFile(self._file(index, number))
        expected = source[0]
        source.close()
        if not torch.isfinite(expected).all():
            return None  # the statistics of the layer where it began name it
        difference = _relative_difference(found.cpu(), expected)
        if difference <= _TOLERANCE.get(found.dtype, 0.0):  # NaN is not
            return None
        return (
            f"Run block by block, {what} differs from that of an ordinary forward pass (relative difference "
            f"{difference:.2g} on one window of the held-out text). The calibration would see inputs that the model "
            "never has, so the run stops; please report this architecture."
        )


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """In float64, a few rows at a time: logits are large."""
    sums = torch.zeros(2, dtype=torch.float64)
    rows = (x.reshape(-1, x.shape[-1]).split(16) for x in (found, expected))
    for one, other in zip(*rows, strict=True):
        sums += torch.stack([(one.double() - other.double()).square().sum(), other.double().square().sum()])
    return float((sums[0] / sums[1].clamp_min(1e-300)).sqrt())
