"""Memory, time and size of a run before any work, from shapes alone.

The skeleton runs once on the meta device, which tells the floating-point operations of a block and which layers share
an input (and so a Gram matrix). Where a model cannot run there (data-dependent control flow),
2 operations per weight and token and one Gram matrix per layer are assumed. Rates are measured by a probe of about a
second. Every run compares the estimated peak with the measured one and records both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..plans import Plan
from .decide import Request
from .embedding import parts_after, saved_bytes
from .run_memory import Run
from .sizes import added_bias_bytes, stored_bytes
from .survey import Survey
from .timing import Rates, TextSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """What `lord-tune plan` shows."""

    parameters: int
    linear_parameters: int
    blocks: int
    layers: int
    model_bytes: int
    model_bytes_after: int | None  # None: ranks are chosen from the calibration
    linear_bits_per_weight: float | None
    ranks: dict[str, int | None] | None  # layer -> rank, None for dense
    peak_bytes: int  # of the process, with `held_bytes`
    held_bytes: int  # of the process before the run
    scratch_bytes: int  # disk, beside the checkpoint
    seconds: float | None  # None: rates were not measured
    phases: dict[str, int]  # phase -> bytes above held_bytes
    bytes_by_part: dict[str, int] | None = None  # of model_bytes_after; the layers as they are where it is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate_run(
    model: PreTrainedModel,  # the skeleton
    survey: Survey,
    request: Request,
    plan: Plan | None,  # None where the calibration decides it
    text: TextSize | None,
    groups: list[set[str]],
    forward_flops: float,  # per token
    held_bytes: int,
    rates: Rates | None,
    processes: int = 1,
    device: torch.device | None = None,  # whose memory it is; the CPU
) -> Estimate:
    """The model of the peak is run_memory.py's."""
    run = Run(model, survey, request, plan, text, groups, device is None or device.type == "cpu")
    phases, size, shapes = run.phases(), run.size, run.shapes
    after = bits = None
    if plan is not None:
        packed = sum(stored_bytes(site, run.choices[n]) for n, site in survey.layers.items())
        biases = sum(added_bias_bytes(site, run.choices[n]) for n, site in survey.layers.items())
        dense = sum(site.dense_bytes for site in survey.layers.values())
        after = sum(size.values()) - dense + packed + biases - saved_bytes(model, run.tables)
        bits = 8.0 * packed / sum(s[0] * s[1] for s in shapes.values())
    return Estimate(
        parameters=sum(t.numel() for t in run.tensors.values()),
        linear_parameters=sum(s[0] * s[1] for s in shapes.values()),
        blocks=len(survey.blocks.modules),
        layers=len(shapes),
        model_bytes=sum(size.values()),
        model_bytes_after=after,
        linear_bits_per_weight=bits,
        ranks=run.ranks,
        peak_bytes=held_bytes + max(phases.values()),
        held_bytes=held_bytes,
        scratch_bytes=run.scratch(),
        seconds=None if rates is None else run.seconds(rates, forward_flops) / processes,
        phases=phases,
        bytes_by_part=parts_after(model, survey, plan, run.tables),
    )
