"""Block-wise recovery: after a block is decomposed, its L and R are tuned until it does again what it did.

    min over L, R of   mean over tokens of  ||f'(x') - f(x)||^2 / ||f(x)||^2

f is the original block on its own inputs x, f' the decomposed one on the inputs x' that the decomposed blocks before it
really give: what they got wrong is part of the error, and can be corrected here. The closed forms of factorizations/
see one layer at a time; this sees the attention and the activation functions between them. Dividing by each token's own
norm keeps attention sinks, whose states are hundreds of times larger, from being all that is fitted.

Adam on float32 copies of L and R, one window a step, rate warmed up over the first twentieth and decayed to 0 by a
cosine; after each pass over the text the error on held-out text decides whether what was learnt is kept. Pivoted
factors are tuned as L and R and pivoted again: on SmolLM2 (rank 300, 8k tokens, rate 2e-3, whose errors add up from
block to block) no pass over C and B helped, and the error of block 18 was 0.175 instead of 0.117 (at 5e-4: 0.136 and
0.122).

Memory: the block, its activations for one window with gradients, and 20 bytes for each number of L and R. The same
idea, on whole models and with more text: LiLlama (Sy et al., NAACL 2025), AA-SVD (arXiv 2604.02119).

It cannot tune factors that are stored in a quantized format (nothing to differentiate); components stored apart in 16
bits (--top-rank) it can.
"""

from __future__ import annotations

import math
import time
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..calibration.collect import BlockWalk
from ..errors import LordError
from ..layers import FactoredLinear, PivotedLinear, QuantizedLinear
from ..layers.quantized_linear import CastLinear
from ..linalg import principal
from ..parallel import Workers
from .base import BlockRecovery

STUDENT, STUDENT_HELDOUT = "student", "student-heldout"  # streams of the states that decomposed blocks give
_WARMUP = 0.05  # of the steps
_BETAS = (0.9, 0.95)
_SCALE = 64.0  # of each token's error: Adam does not notice, gradients of float16 blocks do not vanish


class Recovered(TypedDict):
    """What came of a block."""

    before: float  # held-out error
    after: float
    epochs: int  # of those asked for, how many are kept
    seconds: float


def tune_block(
    walk: BlockWalk,  # streams calibration and heldout hold the original block's outputs, student ones its inputs now
    index: int,
    layers: dict[str, FactoredLinear],  # of the block, in place
    how: BlockRecovery,
    workers: Workers,
) -> Recovered | None:
    """Tune the factors in place; returns the held-out error before and after, the passes kept and the seconds, or None
    where the block has nothing to tune."""
    pairs = [_Pair(layer) for layer in layers.values() if _tunable(layer)]
    if not pairs:
        return None
    start = time.perf_counter()
    values = [value for pair in pairs for value in pair.open()]
    device = values[0].device
    before = error = _heldout_error(walk, index, workers, device)
    best, kept = [pair.stored for pair in pairs], 0
    steps = max(workers.gather(len(walk.windows[STUDENT])))
    total = how.epochs * steps
    optimizer = torch.optim.Adam(values, lr=how.learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    generator = torch.Generator().manual_seed(index)
    for epoch in range(how.epochs):
        order = torch.randperm(len(walk.windows[STUDENT]), generator=generator, device="cpu").tolist()
        for step in range(steps):
            optimizer.zero_grad()
            if step < len(order):  # another process may have one window more
                relative, tokens = _window_error(walk, index, STUDENT, "calibration", order[step], device)
                (relative * (tokens * _SCALE)).backward()
            _share_gradients(values, step < len(order), workers)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        found = [pair.store() for pair in pairs]
        now = _heldout_error(walk, index, workers, device)  # of what would be stored
        for pair in pairs:
            pair.open()
        if not math.isfinite(now):
            raise LordError(
                f"Block-wise recovery diverged in block {index}; lower `recover_learning_rate` ({how.learning_rate:g})."
            )
        if now < error:
            best, error, kept = found, now, epoch + 1
    for pair, modules in zip(pairs, best, strict=True):
        pair.place(modules)
    return {"before": before, "after": error, "epochs": kept, "seconds": time.perf_counter() - start}


class _Pair:
    """The factors of a layer: as they are stored, and opened, which is as float32 L and R that train."""

    def __init__(self, layer: FactoredLinear):
        self.layer = layer
        self.names = ("left", "right") if layer.top_left is None else ("top_left", "top_right")
        self.stored: tuple[nn.Linear, nn.Linear] = (getattr(layer, self.names[0]), getattr(layer, self.names[1]))
        left, right = (factor.weight for factor in self.stored)
        self.dtype = right.dtype
        if isinstance(self.stored[0], PivotedLinear):
            left, right = principal(*layer.dense_factors())
        self.opened = (_linear(left.detach().float(), True), _linear(right.detach().float(), True))

    def place(self, modules: tuple[nn.Linear, nn.Linear]) -> None:
        for name, module in zip(self.names, modules, strict=True):
            setattr(self.layer, name, module)

    def open(self) -> list[Tensor]:
        self.place(self.opened)
        return [factor.weight for factor in self.opened]

    @torch.no_grad()
    def store(self) -> tuple[nn.Linear, nn.Linear]:
        """Place the values that were learnt, in the form and dtype that they are stored in."""
        left, right = (factor.weight for factor in self.opened)
        pivots = isinstance(self.stored[0], PivotedLinear)
        copies = (_linear(left if pivots else left.to(self.dtype)), _linear(right if pivots else right.to(self.dtype)))
        self.place(copies)
        if pivots:
            self.layer.pivot(self.dtype)
        return getattr(self.layer, self.names[0]), getattr(self.layer, self.names[1])


def _linear(weight: Tensor, trains: bool = False) -> CastLinear:
    module = CastLinear(weight.shape[1], weight.shape[0], weight.dtype, device="meta")
    module.weight = nn.Parameter(weight.clone(), requires_grad=trains)
    return module


def _tunable(layer: FactoredLinear) -> bool:
    """Whether the factors, or where components are stored apart, these, are in a floating format."""
    left = layer.left.rest if isinstance(layer.left, PivotedLinear) else layer.left
    pair = (left, layer.right) if layer.top_left is None else (layer.top_left, layer.top_right)
    return layer.rank > 0 and not any(isinstance(factor, QuantizedLinear) for factor in pair)


def _rate(step: int, total: int) -> float:
    """Of the learning rate, at a step."""
    warm = max(1, round(_WARMUP * total))
    return min(1.0, (step + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))


def _window_error(
    walk: BlockWalk, index: int, inputs: str, targets: str, position: int, device: torch.device
) -> tuple[Tensor, int]:
    """(mean over the window's tokens of the relative squared error, tokens)"""
    output = walk.output(index, inputs, position).float()
    target = walk.stored_output(index, targets, position).to(output)
    norms = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = (output - target).square().sum(-1) / norms
    return relative.mean(), relative.numel()


@torch.no_grad()
def _heldout_error(walk: BlockWalk, index: int, workers: Workers, device: torch.device) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    for position in range(len(walk.windows[STUDENT_HELDOUT])):
        error, tokens = _window_error(walk, index, STUDENT_HELDOUT, "heldout", position, device)
        sums += torch.tensor([float(error) * tokens, tokens], dtype=torch.float64)
    workers.add_up(sums)
    return float(sums[0] / sums[1])


def _share_gradients(values: list[Tensor], contributes: bool, workers: Workers) -> None:
    """Every process gets the mean over those that had a window."""
    if workers.size == 1:
        return
    count = torch.tensor([float(contributes)])
    workers.add_up(count)
    for value in values:
        if value.grad is None:
            value.grad = torch.zeros_like(value)
        workers.add_up(value.grad)
        value.grad /= count.to(value.grad.device)
