"""What is done with one layer, given its weight and the statistics of its input. No model, no files.

Two orders of work. When the rank is known, a layer is split and stored at once (`split_layer`, `project_layer`). When
an allocator first needs the spectra of all layers, `analyse` keeps the layer's basis (float32) and error curves, never
its Gram matrix, and `install` cuts the factors from them later: ranks are slices.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import break_even
from ..calibration.moments import InputStatistics, Moments
from ..factorizations import (
    Caldera,
    Factors,
    Fisher,
    PlainSVD,
    Projection,
    Solution,
    Spectrum,
    balance,
    error_curves,
    feedback_alone,
    relative_error,
    round_factors,
    truncate,
)
from ..layer_plan import LayerPlan
from ..layers import FactoredLinear, build_layer, weight_of
from ..quantizers import DTYPES, E8P2, E8P3, E8P4, Rotated
from .base import LayerRecord, Settings

_CURVES = ("calibrated", "heldout", "plain", "beyond_top")


@dataclass(frozen=True)
class Analysis:
    """What is kept of a layer between the walk and the choice of its rank."""

    spectrum: Spectrum
    curves: dict[str, Tensor]  # relative error at rank 0..k
    facts: dict[str, Any]  # seconds, shrinkage, inputs

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        found = {"basis": self.spectrum.basis, "energies": self.spectrum.energies}
        if self.spectrum.centre is not None:
            found["centre"] = self.spectrum.centre.clone()  # layers with one input share it, a file's tensors may not
        return found | {f"curve.{name}": curve for name, curve in self.curves.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Analysis:
        curves = {name: tensors[f"curve.{name}"] for name in _CURVES if f"curve.{name}" in tensors}
        return cls(Spectrum(tensors["basis"], tensors["energies"], tensors.get("centre")), curves, facts)


@dataclass(frozen=True)
class Finished:
    """A layer's record, and its replacement unless it stays dense."""

    record: LayerRecord
    layer: FactoredLinear | None = None


def analyse(
    weight: Tensor, calibration: Moments | None, heldout: InputStatistics | None, settings: Settings
) -> Analysis:
    """Basis and error curves at every rank."""
    start = time.perf_counter()
    solution, curves, shrinkage = _solve(weight, calibration, heldout, settings, None)
    spectrum = solution.spectrum
    keep = spectrum.basis.shape[1]
    if "loss_weights" not in settings.allocator.needs:  # otherwise the dropped directions are weighed too
        keep = min(max(break_even((weight.shape[0], weight.shape[1])), 1), keep)
    kept = Spectrum(spectrum.basis[:, :keep].float().contiguous(), spectrum.energies, spectrum.centre)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - start, "shrinkage": shrinkage}
    facts["inputs"] = {} if calibration is None else calibration.describe()
    return Analysis(kept, curves, facts)


def _solve(
    weight: Tensor,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    settings: Settings,
    rank: int | None,
) -> tuple[Solution, dict[str, Tensor], float | None]:
    """The method's solution, its error curves, and the shrinkage with the least held-out error (at `rank`, or on
    average over the ranks below break-even) where candidates are given."""
    method = settings.method
    assert isinstance(method, Projection)
    if not settings.shrinkages or heldout is None:
        solution = method.solve(weight, calibration)
        curves = {} if calibration is None else error_curves(solution, calibration, heldout)
        return solution, curves, getattr(method, "shrinkage", None)
    limit = min(break_even((weight.shape[0], weight.shape[1])), min(weight.shape))
    best: tuple[float, Solution, dict[str, Tensor], float] | None = None
    for amount in settings.shrinkages:
        solution = dataclasses.replace(method, shrinkage=amount).solve(weight, calibration)  # type: ignore[type-var]
        assert calibration is not None
        curves = error_curves(solution, calibration, heldout)
        curve = curves["heldout"]
        error = float(curve[rank]) if rank is not None else float(curve[: limit + 1].mean())
        if best is None or error < best[0]:
            best = (error, solution, curves, amount)
    assert best is not None
    return best[1:]


def install(module: Any, analysis: Analysis, rank: int | None, settings: Settings) -> Finished:
    """Cut the factors of `rank` from the analysis; None leaves the layer dense."""
    start = time.perf_counter()
    if rank is None:
        limit = break_even(_shape(module))
        above = f"rank {settings.rank} is above its break-even {limit}"
        return left_dense(module, analysis.facts["seconds"], above if settings.rank is not None else None)
    layer = _build(module, truncate(weight_of(module), analysis.spectrum, rank), None, settings)
    record = _record(layer, analysis.curves, rank, analysis.facts)
    record.seconds += time.perf_counter() - start
    return Finished(record, layer)


def project_layer(
    module: Any, calibration: Moments | None, heldout: InputStatistics | None, rank: int | None, settings: Settings
) -> Finished:
    """The whole way at a known rank, without a backbone."""
    if rank is None:
        return left_dense(module, 0.0, None)
    start = time.perf_counter()
    weight = weight_of(module)
    solution, curves, shrinkage = _solve(weight, calibration, heldout, settings, rank)
    centre = solution.spectrum.centre
    factors = _rounded(truncate(weight, solution.spectrum, rank), weight, calibration, settings, centre)
    layer = _build(module, factors, None, settings)
    facts = {"seconds": 0.0, "shrinkage": shrinkage, "inputs": {} if calibration is None else calibration.describe()}
    record = _record(layer, curves, rank, facts)
    if settings.rounds_factors and calibration is not None:
        _measure_stored(record, layer, weight, calibration, heldout, centre)
    record.seconds = time.perf_counter() - start
    return Finished(record, layer)


def _measure_stored(
    record: LayerRecord,
    layer: FactoredLinear,
    weight: Tensor,
    calibration: Moments,
    heldout: InputStatistics | None,
    centre: Tensor | None,
) -> None:
    """Put the errors with L and R as they are stored into the record."""
    dense = weight.double()
    residual = dense - layer.dense_weight(torch.float64)
    before = record.error_calibrated
    record.error_calibrated = relative_error(residual, dense, calibration, centre)
    record.error_heldout = None if heldout is None else relative_error(residual, dense, heldout, centre)
    if record.error_beyond_top is not None and before:  # the same energy over another reference
        record.error_beyond_top = min(1.0, record.error_beyond_top * record.error_calibrated / before)


def _rounded(
    factors: Factors, target: Tensor, calibration: Moments | None, settings: Settings, centre: Tensor | None
) -> Factors:
    """L and R rounded with feedback to fit `target`, where they are stored in a quantized format.

    Data-free methods stay data-free: they would be no baseline otherwise.
    """
    form = settings.factor_form(factors.rank)
    if form is None:
        return factors
    aim = target.double() if centre is None else factors.product()  # a centred method leaves W's mean to the bias
    weighed = calibration is not None and "input_gram" in settings.method.needs
    stored = round_factors(aim, calibration.gram if weighed else None, factors, form)  # type: ignore[union-attr]
    if centre is None:
        return stored
    return dataclasses.replace(stored, bias_shift=(target.double() - stored.product()) @ centre.double())


def split_layer(
    module: Any,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    rank: int,
    settings: Settings,
    fisher: Fisher | None = None,
    compare: bool = False,  # with feedback rounding alone at other widths
) -> Finished:
    """W = Q + L R with a quantized backbone."""
    start = time.perf_counter()
    weight = weight_of(module)
    quantizer = settings.quantizer
    assert quantizer is not None
    alternates = isinstance(settings.method, Caldera)  # its Q alone is not plain rounding
    method = settings.method if rank or alternates else PlainSVD()  # rank 0 is Q alone
    shrinkage = getattr(method, "shrinkage", None)
    if settings.shrinkages and heldout is not None and rank:
        backbone = quantizer.dequantize(quantizer.quantize(weight), _shape(module), torch.float64)
        shrinkage = _solve(weight.double() - backbone, calibration, heldout, settings, rank)[2]
        method = dataclasses.replace(method, shrinkage=shrinkage)  # type: ignore[type-var]
        del backbone
    if isinstance(method, Caldera):
        method = dataclasses.replace(method, factor_form=settings.factor_form(rank))
    split = method.split(weight, calibration, rank, quantizer, heldout, fisher)
    assert split.backbone is not None
    factors = split.factors
    if not alternates:
        factors = _rounded(factors, weight.double() - split.backbone, calibration, settings, split.centre)
    layer = _build(module, factors, split.parts, settings)
    record = _record(layer, {}, rank, {"seconds": 0.0, "shrinkage": shrinkage, "inputs": {}})
    if calibration is not None:
        dense = weight.double()
        record.error_backbone = relative_error(dense - split.backbone, dense, calibration)
        centre = split.centre
        del split, factors
        first = dense - quantizer.dequantize(quantizer.quantize(weight), layer.plan.shape, torch.float64)
        plain = truncate(first, PlainSVD().spectrum(first, None), rank)
        record.error_plain = relative_error(first - plain.product(), dense, calibration)
        del first, plain
        _measure_stored(record, layer, weight, calibration, heldout, centre)
        record.inputs = calibration.describe()
        if compare and weight.shape[1] <= COMPARED_INPUTS:
            record.equal_bits = _equal_bits(weight, calibration, heldout)
    record.seconds = time.perf_counter() - start
    return Finished(record, layer)


_REFERENCES = (E8P2, E8P3, E8P4)
COMPARED_INPUTS = 8192  # wider layers are not compared: feedback needs several Gram matrices


def _equal_bits(
    weight: Tensor, calibration: Moments, heldout: InputStatistics | None
) -> dict[str, dict[str, float | None]]:
    """Feedback rounding alone at 2, 3 and 4 bits: what the bits of L R would have bought without it."""
    dense, found = weight.double(), {}
    forms: list[Any] = [Rotated(form()) for form in _REFERENCES]
    for form, split in zip(forms, feedback_alone(weight, calibration, forms, heldout), strict=True):
        assert split.parts is not None and split.backbone is not None
        residual = dense - split.backbone
        size = sum(t.numel() * t.element_size() for t in split.parts.values())
        found[form.name] = {
            "bits": 8.0 * size / dense.numel(),
            "calibrated": relative_error(residual, dense, calibration),
            "heldout": None if heldout is None else relative_error(residual, dense, heldout),
        }
    return found


def left_dense(module: Any, seconds: float, reason: str | None) -> Finished:
    """The record of a layer that stays as it is."""
    bits = 8.0 * module.weight.element_size()
    notes = [f"left dense: {reason}"] if reason else []
    record = LayerRecord(_shape(module), "dense", "dense", "none", bits, 0.0, 0.0, 0.0, None, seconds, warnings=notes)
    return Finished(record)


def stored_bits_per_weight(layer: nn.Module, shape: tuple[int, int]) -> float:
    """Bits of all stored tensors of a layer but its bias, per weight of the dense matrix."""
    size = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")
    return 8.0 * size / (shape[0] * shape[1])


def _shape(module: Any) -> tuple[int, int]:
    weight = weight_of(module)
    return weight.shape[0], weight.shape[1]


def _build(module: Any, factors: Factors, parts: dict[str, Tensor] | None, settings: Settings) -> FactoredLinear:
    weight, quantizer = weight_of(module), settings.quantizer
    own = next((name for name, dtype in DTYPES.items() if dtype == weight.dtype), "fp32")
    form = settings.factor_format if settings.factor_format and factors.rank else own  # no format packs no numbers
    plan = LayerPlan(
        shape=_shape(module),
        rank=factors.rank,
        method=settings.method.name,
        backbone="none" if quantizer is None else quantizer.name,
        backbone_options={} if quantizer is None else quantizer.options(),
        left_format=form,
        right_format=form,
        factor_options={} if form in DTYPES else settings.factor_options,
        top_rank=0 if factors.top is None else factors.top.rank,
        top_format="fp32" if factors.top is None else settings.top_format,
        top_options={} if factors.top is None else settings.top_options,
        bias=module.bias is not None or factors.bias_shift is not None,
        conv1d=not isinstance(module, nn.Linear),
    )
    factors = balance(factors) if form in DTYPES else factors
    return build_layer(plan, factors, parts, module.bias, weight.dtype)


def _record(layer: FactoredLinear, curves: dict[str, Tensor], rank: int, facts: dict[str, Any]) -> LayerRecord:
    plan = layer.plan
    at = {name: float(curve[rank]) for name, curve in curves.items()}
    return LayerRecord(
        plan.shape,
        rank,
        plan.method,
        plan.backbone,
        stored_bits_per_weight(layer, plan.shape),
        error_calibrated=at.get("calibrated"),
        error_heldout=at.get("heldout"),
        error_plain=at.get("plain"),
        error_backbone=None,
        seconds=facts["seconds"],
        error_beyond_top=at.get("beyond_top"),
        shrinkage=facts["shrinkage"],
        inputs=facts["inputs"],
    )
