"""Time of a run from shapes: operations of a layer and of a forward pass, rates of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..allocation import Bolaco
from ..calibration.blocks import first_input
from ..errors import LordError
from ..factorizations import Factorization, Projection
from ..memory import synchronize
from ..plans import LayerChoice, TablePlan
from ..sites import Site
from .choices import Sized
from .decide import Request
from .survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# a weight's rounding with feedback, in operations at the rate of float32 products: once, and with all candidates
_ROUNDING, _FITTING = 1e4, 5e4
# the same of an embedding or output head, for formats that round numbers and that round blocks (e8): 1.2e4 to 4.2e4 and
# 6.5e4 to 9.5e4 on 16,384 x 576 and 8,192 x 2,048 numbers, with feedback as much as to the nearest
_TABLE, _BLOCK_TABLE = 2e4, 8e4
_EIGH = 9.0  # operations per k^3 of a symmetric eigenproblem with vectors (Golub and Van Loan, 8.3)
# how much slower than a matrix product these run, for dealing out layers (measured at k = 576: 2.5 and 4)
_EIGH_SLOWNESS, _QR_SLOWNESS = 2.5, 4.0


def layer_flops(shape: tuple[int, int], method: Factorization) -> float:
    """Work of factorizing one layer, in operations at the rate of a float64 matrix product; among layers of one method
    the relation is what counts."""
    out, inputs = shape
    if method.alternates:  # rounding by weights, products by inputs; equal at 1,000 inputs
        return (_FITTING + _ROUNDING * (method.solves + 3)) * out * inputs * (1.0 + inputs / 1000)
    k = min(shape)
    rotation = 4.0 * out * k * k * _QR_SLOWNESS if out > inputs else 0.0
    eigen = 1.5 * _EIGH * _EIGH_SLOWNESS * k**3  # the float32 one of the baseline counts half
    weighed = _weighing(shape) if "output_gram" in method.needs else 0.0
    return rotation + eigen + weighed + 2.0 * k * inputs * inputs + 4.0 * k * k * inputs + 8.0 * k**3


def _weighing(shape: tuple[int, int]) -> float:
    """The outputs' weights in the coordinates of the smaller side, their root, the moments between roots, the dual."""
    out, k = shape[0], min(shape)
    turned = 2.0 * out * out * k + 2.0 * out * k * k if out > shape[1] else 0.0
    return turned + 14.0 * k**3


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

        def rate(work: Callable[[], object], operations: float) -> float:
            work()
            synchronize(device)
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                work()
                synchronize(device)
                best = min(best, time.perf_counter() - start)
            return operations / best

        n, k = 768, 384
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(n, n, generator=generator, device="cpu").to(device)
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
    validation: int = 0  # half of it is what an allocator that searches runs its trials on


def trace(
    model: PreTrainedModel, survey: Survey, run: Callable[[PreTrainedModel, torch.Tensor], object], length: int
) -> tuple[list[set[str]], float]:
    """(groups of the first block's layers that share an input, operations of a forward pass of all blocks per token).

    `run` gets the skeleton and (1, length) ids on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    members = {name: site.module(model) for name, site in survey.members(0).items()}
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
        inside = survey.blocks.names()[0]
        flops = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("." + inside))
        if flops and {name for _, names in seen for name in names} == set(members):
            return [names for _, names in seen], flops * len(survey.blocks.modules) / length
    except LordError:
        raise
    except Exception:  # a model may fail on tensors without values in any way; it is estimated from its weights
        pass
    finally:
        for handle in handles:
            handle.remove()
    weights = sum(p.numel() for block in survey.blocks.modules for p in block.parameters())
    return [{name} for name in members], 2.0 * weights


def rounds_with_feedback(choice: LayerChoice) -> bool:
    """Whether the Q of a projection is (that of CALDERA always is)."""
    method = choice.factorization()
    return choice.backbone != "none" and isinstance(method, Projection) and method.rounding == "feedback"


def run_seconds(
    sites: Mapping[str, Site],
    choices: Mapping[str, LayerChoice],  # where the calibration decides the ranks, without them
    request: Request,
    inputs: list[int],  # of one block: widths of the inputs that have a Gram matrix each
    count: int,
    text: TextSize | None,
    forward_flops: float,
    rates: Rates,
    walks: int,
    weighted: bool,
    looks: int = 1,  # at every layer, by a calibrating pass: at L R, and at every format
) -> float:
    """Of one process that does it all."""
    total = 0.0
    if text is not None:
        tokens = text.tokens + text.heldout
        runs = walks + (request.propagate == "sequential")  # once more to hand on what the decomposed block makes of it
        if request.recovery is not None:  # a training pass is three; the original's and the tuned block's outputs
            runs += 2 + 3 * request.recovery.epochs
        total += runs * tokens * forward_flops / rates.forward
        total += walks * count * sum(text.tokens * (width + 192.0) * width for width in inputs) / rates.single
        whole = request.refine + 1 if request.refine else 0  # models that are run on held-out text
        if request.refine and not request.measure_control and isinstance(request.budget, Sized):
            whole += request.budget.includes_control  # which --refine of a mixture runs as well
        total += (whole + (2 if request.measure_control else 0)) * text.heldout * forward_flops / rates.forward
        if isinstance(request.budget, Sized) and isinstance(request.budget.allocator, Bolaco):
            rule = request.budget.allocator  # and the head on the original's states
            total += 1.2 * (rule.probes + rule.trials / 2) * text.validation * forward_flops / rates.forward
            cut = sum(4.0 * site.numbers * min(site.shape) for site in sites.values())
            total += (rule.probes + rule.trials) * cut / rates.double
        if weighted:
            total += 4 * text.sensitivity * forward_flops / rates.forward
            if request.predicts_loss:  # second moments of the gradients, and of the inputs as the loss notices them
                squares = sum(site.shape[0] ** 2 + request.weighs_noise * site.shape[1] ** 2 for site in sites.values())
                total += 1.2 * text.sensitivity * squares / rates.single
    for name, site in sites.items():
        method = choices[name].factorization()
        if method.alternates:
            total += walks * _alternation_seconds(site.shape, 0 if choices[name].rank == 0 else method.solves, rates)
            continue
        out, width = site.shape
        k = min(site.shape)
        tries = len(method.candidates()) * (walks + looks - 1) * method.solves
        eigenproblems = _EIGH * k**3 * (1.5 if text is not None else 1.0)
        products = 2.0 * k * width * width * (text is not None) + 2.0 * out * k * (width + k) + 6.0 * k**3
        products += _weighing(site.shape) if "output_gram" in method.needs else 0.0
        if text is not None and rounds_with_feedback(choices[name]):
            total += (_FITTING + (looks - 1) * _ROUNDING) * out * width / rates.single
        total += tries * (eigenproblems / rates.eigen + products / rates.double)
    return total


def tables_seconds(
    tables: Mapping[str, TablePlan],
    head: str | None,  # of them the one that the output head reads, rounded with feedback where there is text
    read: int,  # tokens of the pass that sums the head's inputs; 0: there is none
    forward_flops: float,
    rates: Rates,
) -> float:
    """Of rounding embeddings and output head, and of the pass over all blocks before it."""
    total = 0.0
    for name, plan in tables.items():
        numbers, width = plan.shape[0] * plan.shape[1], plan.shape[1]
        total += (_BLOCK_TABLE if plan.quantizer().block > 1 else _TABLE) * numbers / rates.single
        if name == head and read:
            total += read * forward_flops / rates.forward + read * (width + 192.0) * width / rates.single
    return total


def _alternation_seconds(shape: tuple[int, int], iterations: int, rates: Rates) -> float:
    """Of CALDERA on one layer: the first Q with its choices, then a rounding for every iteration (four for the first),
    with the errors, eigenproblems and feedback that go with them."""
    out, width = shape
    k = min(shape)
    roundings = _FITTING + _ROUNDING * (iterations + 3 if iterations else 0)
    products = (6 + 5 * iterations) * 2.0 * out * width * width + 8.0 * iterations * width**3
    return roundings * out * width / rates.single + products / rates.double + iterations * _EIGH * k**3 / rates.eigen
