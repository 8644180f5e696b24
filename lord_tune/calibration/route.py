"""What the two ways of running a model block by block have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from .blocks import Blocks, Run

Loss = Callable[[nn.Module, Tensor], Tensor]  # (model, (1, length) ids) -> scalar, summed over tokens
Score = Callable[[nn.Module, Tensor], tuple[Tensor, int]]  # the same, and of how many tokens it is the sum
Answer = TypeVar("Answer")
Ask = Callable[[nn.Module, Tensor], Answer]  # of the same


@dataclass(frozen=True)
class Ground:
    """The model, this process's windows and the folder that a walk works on."""

    model: nn.Module
    blocks: Blocks
    forward: Run
    folder: Path
    rank: int  # of this process
    examples: dict[str, Tensor]  # stream -> its first window (1, length), the same in all processes
    windows: dict[str, Tensor] = field(default_factory=dict)  # stream -> (window, length) ids of this process

    def file(self, kind: str, stream: str, index: int) -> Path:
        return self.folder / f"{kind}-{stream}-{index:05d}-{self.rank}.bin"

    def device(self, index: int) -> torch.device:
        """Where block `index` is."""
        return next(iter(self.blocks.modules[index].parameters())).device

    def device_outside(self) -> torch.device:
        """Where the parts outside the blocks are that are in memory."""
        return next(p for p in self.model.parameters() if not p.is_meta).device


class Route(Protocol):
    """One way of running the blocks of a model one at a time over windows of text, with states in files."""

    whole_forward: bool  # the parts outside the blocks, but for the output head, run again for every block

    def start(self) -> None:
        """Write what block 0 needs. The parts outside the blocks and block 0 are in memory."""
        ...

    def resume(self) -> None:
        """Take up a walk that an earlier process started, in the same circumstances."""
        ...

    def advance(self, index: int, stream: str, keep: bool) -> None:
        """Run block `index` over a stream; `keep` writes what comes out. Hooks on its layers see their inputs."""
        ...

    def output(self, index: int, stream: str, position: int) -> Tensor:
        """The output of block `index` for one window, computed now; differentiable by the block's parameters."""
        ...

    def stored_output(self, index: int, stream: str, position: int) -> Tensor:
        """The output of block `index` for one window as `advance` wrote it."""
        ...

    def result(self, stream: str, position: int) -> object:
        """What the model returns for a window, from the outputs of its blocks. Needs all parts outside the blocks."""
        ...

    def answers(self, stream: str, ask: Ask[Answer]) -> Iterator[Answer]:
        """What `ask` finds of every window, from the outputs of its blocks. Needs all parts outside the blocks."""
        ...

    def write_gradients(self, stream: str, loss: Loss) -> None:
        """Gradients of the loss by the blocks' outputs, as far as parts outside the blocks use them."""
        ...

    def backward(self, index: int, stream: str) -> None:
        """Run block `index` again with gradients; hooks on its layers see theirs."""
        ...

    def forget(self, index: int, stream: str) -> None:
        """Remove what only the blocks before `index` needed, the input of block `index` included."""
        ...

    def forget_gradients(self, index: int, stream: str) -> None:
        """Remove what only the way back from blocks after `index` needed."""
        ...
