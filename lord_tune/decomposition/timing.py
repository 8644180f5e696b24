"""Time of a run from shapes: operations of a layer and of a forward pass, rates of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.blocks import first_input
from ..errors import LordError
from .base import Settings
from .survey import Survey

_ROUNDING = 3e4  # a weight's rounding with feedback, in operations at the rate of float32 products (measured: 2e4-5e4)
_EIGH = 9.0  # operations per k^3 of a symmetric eigenproblem with vectors (Golub and Van Loan, 8.3)
# how much slower than a matrix product these run, for dealing out layers (measured at k = 576: 2.5 and 4)
_EIGH_SLOWNESS, _QR_SLOWNESS = 2.5, 4.0


def layer_flops(shape: tuple[int, int], settings: Settings) -> float:
    """Work of factorizing one layer, in operations at the rate of a float64 matrix product; among layers of one method
    the relation is what counts."""
    out, inputs = shape
    if settings.method.name == "caldera":  # rounding by weights, products by inputs; equal at 1,000 inputs
        return _ROUNDING * out * inputs * (1.0 + inputs / 1000)
    k = min(shape)
    rotation = 4.0 * out * k * k * _QR_SLOWNESS if out > inputs else 0.0
    eigen = 1.5 * _EIGH * _EIGH_SLOWNESS * k**3  # the float32 one of the baseline counts half
    return rotation + eigen + 2.0 * k * inputs * inputs + 4.0 * k * k * inputs + 8.0 * k**3


@dataclass(frozen=True)
class Rates:
    """Operations per second of this machine, as the run uses it."""

    forward: float  # matrix products in the model's dtype
    single: float  # float32 products (Gram matrices)
    double: float  # float64 products
    eigen: float  # _EIGH k^3 over the time of float64 eigh

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> Rates:
        """A probe of about a second."""

        def rate(work: Callable[[], Any], operations: float) -> float:
            work()
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
            return operations / best

        n, k = 768, 384
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(n, n, generator=generator).to(device)
        low, wide = a.to(dtype), a.double()
        small = (wide @ wide.T)[:k, :k].contiguous()
        return cls(
            rate(lambda: nn.functional.linear(low, low), 2.0 * n**3),
            rate(lambda: a.T @ a, 2.0 * n**3),
            rate(lambda: wide @ wide, 2.0 * n**3),
            rate(lambda: torch.linalg.eigh(small), _EIGH * k**3),
        )


@dataclass(frozen=True)
class TextSize:
    """How much text a run reads."""

    tokens: int
    heldout: int
    length: int  # of a window
    sensitivity: int = 0
    sensitivity_length: int = 0


def trace(
    model: nn.Module, found: Survey, run: Callable[[nn.Module, torch.Tensor], Any], length: int
) -> tuple[list[set[str]], float]:
    """(groups of the first block's layers that share an input, operations of a forward pass of all blocks per token).

    `run` gets the skeleton and (1, length) ids on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    members = found.members(0)
    seen: list[tuple[torch.Tensor, set[str]]] = []

    def hook(name: str) -> Callable:
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_input(args, kwargs)
            group = next((names for tensor, names in seen if tensor is x), None)
            if group is None:
                group = set()
                seen.append((x, group))
            group.add(name)

        return observe

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in members.items()]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(model, torch.zeros(1, length, dtype=torch.long, device="meta"))
        inside = found.blocks.names()[0]
        flops = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("." + inside))
        if flops and {name for _, names in seen for name in names} == set(members):
            return [names for _, names in seen], flops * len(found.blocks.modules) / length
    except LordError:
        raise
    except Exception:  # a model may fail on tensors without values in any way; it is estimated from its weights
        pass
    finally:
        for handle in handles:
            handle.remove()
    weights = sum(p.numel() for block in found.blocks.modules for p in block.parameters())
    return [{name} for name in members], 2.0 * weights


def run_seconds(
    shapes: dict[str, tuple[int, int]],
    inputs: list[int],  # of one block
    count: int,
    text: TextSize | None,
    forward_flops: float,
    rates: Rates,
    walks: int,
    weighted: bool,
    settings: Settings,
) -> float:
    total = 0.0
    if text is not None:
        tokens = text.tokens + text.heldout
        runs = walks + (
            settings.propagate == "sequential"
        )  # once more to hand on what the decomposed block makes of it
        if settings.recovery is not None:  # a training pass is three; the original's and the tuned block's outputs
            runs += 2 + 3 * settings.recovery.epochs
        total += runs * tokens * forward_flops / rates.forward
        total += walks * count * sum(text.tokens * (width + 192.0) * width for width in inputs) / rates.single
        if weighted:
            total += 4 * text.sensitivity * forward_flops / rates.forward
    if settings.method.name == "caldera":
        own = sum(_alternation_seconds(shape, settings, rates) for shape in shapes.values())
        return total + walks * own
    for shape in shapes.values():
        out, width = shape
        k = min(shape)
        tries = max(1, len(settings.shrinkages)) * walks * getattr(settings.method, "iterations", 1)
        eigenproblems = _EIGH * k**3 * (1.5 if text is not None else 1.0)
        products = 2.0 * k * width * width * (text is not None) + 2.0 * out * k * (width + k) + 6.0 * k**3
        total += tries * (eigenproblems / rates.eigen + products / rates.double)
    return total


def _alternation_seconds(shape: tuple[int, int], settings: Settings, rates: Rates) -> float:
    """Of CALDERA on one layer: six roundings to choose damping and scales, then one for every iteration (two for the
    first), with the errors, eigenproblems and feedback that go with them."""
    out, width = shape
    k = min(shape)
    iterations = 0 if settings.rank == 0 else getattr(settings.method, "iterations", 1)
    roundings = 6 + (iterations + 1 if iterations else 0)
    products = (6 + 5 * iterations) * 2.0 * out * width * width + 8.0 * iterations * width**3
    return (
        roundings * _ROUNDING * out * width / rates.single
        + products / rates.double
        + iterations * _EIGH * k**3 / rates.eigen
    )
