"""Decompose a loaded model: calibrate block by block, choose ranks, factorize, replace.

Two orders of work. With a quantized backbone every layer gets the given rank, so a layer is split and replaced as soon
as its block has been calibrated. Without one (LoRD) the allocator first needs the spectra of all layers: the walk keeps
each layer's basis (float32) and error curves, never its Gram matrix; ranks are slices.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .allocation import Allocator, LayerSpectrum, break_even, factor_cost
from .calibration.collect import Blocks, BlockWalk, find_blocks
from .calibration.moments import Moments
from .calibration.sensitivity import output_sensitivity
from .errors import CalibrationError, LordError, LordWarning, UsageError
from .factorizations import (
    Factorization,
    Factors,
    PlainSVD,
    Projection,
    Spectrum,
    balance,
    error_curves,
    relative_error,
    truncate,
)
from .layer_plan import DTYPES, LayerPlan
from .layers import build_layer, check_finite, select_linears, shape_of, weight_of
from .quantizers import Quantizer

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Settings:
    """What to do with every layer."""

    method: Factorization
    quantizer: Quantizer | None
    rank: int | None  # either a rank ...
    kept_fraction: float | None  # ... or a budget with an allocator
    allocator: Allocator
    factor_format: str | None  # a key of DTYPES, a quantizer's name, or None: the weight's own dtype
    factor_options: dict[str, Any] = field(default_factory=dict)
    targets: str | None = None
    exclude: str | None = None


@dataclass(frozen=True)
class Windows:
    """Token ids, (window, length) each."""

    calibration: Tensor
    heldout: Tensor
    sensitivity: Tensor  # for the backward pass; shorter windows hold fewer activations


@dataclass(frozen=True)
class Task:
    """How this kind of model is run; supplied by integrations, so that nothing here knows a model class."""

    forward: Callable[[nn.Module, Tensor], Any]  # (model, (1, length) ids)
    loss: Callable[[nn.Module, Tensor], Tensor]  # the same -> scalar, summed over tokens


@dataclass
class LayerRecord:
    """What became of a layer; the errors are relative output errors, None when no text was given.

    Without a backbone they are those of the factors before these are rounded to `factor_format` (the Gram matrix is
    gone by then: below 0.5 % for 16 bits, more for NF4); with one they are of what is stored.
    """

    shape: tuple[int, int]
    rank: int | str  # "dense" for a layer left alone
    method: str
    backbone: str
    bits_per_weight: float
    error_calibrated: float | None
    error_heldout: float | None
    error_plain: float | None  # plain SVD at the same rank (of W - Q where there is a backbone), on the same text
    error_backbone: float | None  # Q alone, without L R
    seconds: float
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Analysis:
    """What is kept of a LoRD layer between the walk and the choice of its rank."""

    spectrum: Spectrum
    curves: dict[str, Tensor]  # calibrated, heldout, plain: relative error at rank 0..k
    seconds: float


def decompose_model(
    model: nn.Module,
    settings: Settings,
    windows: Windows | None,
    task: Task,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, LayerRecord], dict[str, str]]:
    """Replace the chosen linear layers of `model` in place.

    Returns the record of every eligible layer, and the reason for each linear layer that was not eligible.
    """
    model.eval()
    blocks = find_blocks(model)
    layers, skipped = select_linears(model, blocks.names(), settings.targets, settings.exclude)
    check_finite(dict(model.named_modules()))
    _check_budget(layers, settings)
    needs = settings.method.needs | (settings.allocator.needs if settings.kept_fraction is not None else frozenset())
    if windows is None and needs & {"input_gram", "loss_weights"}:
        raise CalibrationError(
            f"Method '{settings.method.name}' with these ranks needs calibration text; pass --calibration FILE."
        )
    streams = {} if windows is None else {"calibration": windows.calibration, "heldout": windows.heldout}
    walk = BlockWalk(model, blocks, streams, task.forward) if windows is not None else None
    if settings.quantizer is None and not isinstance(settings.method, Projection):
        raise UsageError(f"Method '{settings.method.name}' needs a quantized backbone; pass --backbone nf4.")
    records: dict[str, LayerRecord] = {}
    analyses: dict[str, _Analysis] = {}
    for index, members in enumerate(_by_block(blocks, layers)):
        moments = walk.collect(index, members) if walk is not None else {}
        for name, module in members.items():
            own = {stream: of_layer.get(name) for stream, of_layer in moments.items()}
            if walk is not None and own["calibration"] is None:
                records[name] = _left_dense(module, 0.0, "it never ran on the calibration text")
            elif settings.quantizer is None:
                analyses[name] = _analyse(weight_of(module), own, settings)
            else:
                records[name] = _split_layer(model, name, module, own, settings)
        progress("calibrating and factorizing", index + 1, len(blocks.modules))
    if analyses:
        ranks = _choose_ranks(model, layers, analyses, settings, windows, task, progress)
        for name, rank in ranks.items():
            records[name] = _install(model, name, layers[name], analyses.pop(name), rank, settings)
    for name, record in records.items():
        for text in record.warnings:
            warnings.warn(f"{name}: {text}", LordWarning, stacklevel=2)
    if all(record.rank == "dense" for record in records.values()):
        raise LordError("Every layer stays dense at this budget, so nothing is done; choose another --kept-fraction.")
    return {name: records[name] for name in layers}, skipped


def _by_block(blocks: Blocks, layers: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    return [
        {name: m for name, m in layers.items() if prefix == "" or name.startswith(prefix + ".")}
        for prefix in blocks.names()
    ]


def _check_budget(layers: dict[str, nn.Module], settings: Settings) -> None:
    """Refuse impossible ranks before any calibration."""
    shapes = {name: shape_of(module) for name, module in layers.items()}
    if (settings.rank is None) == (settings.kept_fraction is None):
        raise UsageError("Give either --rank or --kept-fraction, exactly one of them.")
    if settings.kept_fraction is not None:
        if settings.quantizer is not None:
            raise UsageError("--kept-fraction counts parameters of L and R against W; with a --backbone give --rank.")
        settings.allocator.allocate(
            {n: LayerSpectrum(s, torch.zeros(min(s) + 1)) for n, s in shapes.items()}, settings.kept_fraction
        )
        return
    rank = settings.rank
    assert rank is not None
    if rank < (1 if settings.quantizer is None else 0):
        raise UsageError(f"--rank {rank} came; a rank is at least 1 (0 is plain rounding and needs a --backbone).")
    if settings.quantizer is not None:
        small = {name: shape for name, shape in shapes.items() if rank > min(shape)}
        if small:
            name, shape = next(iter(small.items()))
            raise UsageError(
                f"--rank {rank} exceeds the smaller side of {len(small)} layers (like {name}, {shape[0]}x{shape[1]}); "
                f"choose at most {min(map(min, shapes.values()))} or --exclude them."
            )
    elif all(rank > break_even(shape) for shape in shapes.values()):
        best = max(map(break_even, shapes.values()))
        raise UsageError(
            f"--rank {rank} is above break-even for every layer: L and R would hold more numbers than W. "
            f"Choose at most {best}, or add --backbone nf4."
        )


def _left_dense(module: Any, seconds: float, reason: str | None) -> LayerRecord:
    weight = weight_of(module)
    bits = 8.0 * module.weight.element_size()
    shape = (weight.shape[0], weight.shape[1])
    notes = [f"left dense: {reason}"] if reason else []
    return LayerRecord(shape, "dense", "dense", "none", bits, 0.0, 0.0, 0.0, None, seconds, notes)


def _analyse(weight: Tensor, moments: dict[str, Moments | None], settings: Settings) -> _Analysis:
    start = time.perf_counter()
    method = settings.method
    assert isinstance(method, Projection)
    calibration, heldout = moments.get("calibration"), moments.get("heldout")
    spectrum = method.spectrum(weight, calibration)
    curves = {} if calibration is None else error_curves(weight, spectrum, calibration, heldout)
    keep = spectrum.basis.shape[1]
    if settings.rank is not None or "loss_weights" not in settings.allocator.needs:
        keep = min(max(break_even((weight.shape[0], weight.shape[1])), 1), keep)
    kept = Spectrum(spectrum.basis[:, :keep].float().contiguous(), spectrum.energies, spectrum.centre)
    return _Analysis(kept, curves, time.perf_counter() - start)


def _choose_ranks(
    model: nn.Module,
    layers: dict[str, nn.Module],
    analyses: dict[str, _Analysis],
    settings: Settings,
    windows: Windows | None,
    task: Task,
    progress: Progress,
) -> dict[str, int | None]:
    shapes = {name: shape_of(layers[name]) for name in analyses}
    if settings.rank is not None:
        return {name: settings.rank if settings.rank <= break_even(shape) else None for name, shape in shapes.items()}
    weights: dict[str, Tensor] = {}
    if "loss_weights" in settings.allocator.needs:
        assert windows is not None
        progress("measuring the loss's sensitivity", 0, 1)
        bases = {name: analysis.spectrum.basis for name, analysis in analyses.items()}
        weights = output_sensitivity(model, windows.sensitivity, layers, bases, task.loss)
        progress("measuring the loss's sensitivity", 1, 1)
    spectra = {}
    for name, analysis in analyses.items():
        energies = analysis.spectrum.energies.cpu()
        spectra[name] = LayerSpectrum(shapes[name], energies, weights.get(name))
    assert settings.kept_fraction is not None
    ranks = settings.allocator.allocate(spectra, settings.kept_fraction)
    numbers = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    costs = {name: numbers[name] if rank is None else factor_cost(shapes[name], rank) for name, rank in ranks.items()}
    kept = sum(costs.values()) / sum(numbers.values())
    if kept > settings.kept_fraction + 1e-9:
        dense = [name for name, rank in ranks.items() if rank is None]
        warnings.warn(
            f"{kept:.3f} of the parameters are kept, {settings.kept_fraction:g} were asked for: {len(dense)} layers, "
            f"like {dense[0]}, would get less than the smallest rank and stay dense.",
            LordWarning,
            stacklevel=2,
        )
    return ranks


def _format_of(settings: Settings, weight: Tensor) -> str:
    if settings.factor_format is not None:
        return settings.factor_format
    return next((name for name, dtype in DTYPES.items() if dtype == weight.dtype), "fp32")


def _make_plan(module: Any, factors: Factors, settings: Settings) -> LayerPlan:
    weight = weight_of(module)
    form = _format_of(settings, weight)
    quantizer = settings.quantizer
    return LayerPlan(
        shape=(weight.shape[0], weight.shape[1]),
        rank=factors.left.shape[1],
        method=settings.method.name,
        backbone="none" if quantizer is None else quantizer.name,
        backbone_options={} if quantizer is None else quantizer.options(),
        left_format=form,
        right_format=form,
        factor_options={} if form in DTYPES else settings.factor_options,
        bias=module.bias is not None or factors.bias_shift is not None,
        conv1d=not isinstance(module, nn.Linear),
    )


def stored_bits_per_weight(layer: nn.Module, shape: tuple[int, int]) -> float:
    """Bits of all stored tensors of a layer but its bias, per weight of the dense matrix."""
    size = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")
    return 8.0 * size / (shape[0] * shape[1])


def _install(
    model: nn.Module, name: str, module: Any, analysis: _Analysis, rank: int | None, settings: Settings
) -> LayerRecord:
    start = time.perf_counter()
    weight = weight_of(module)
    if rank is None:
        limit = break_even((weight.shape[0], weight.shape[1]))
        above = f"rank {settings.rank} is above its break-even {limit}"
        return _left_dense(module, analysis.seconds, above if settings.rank is not None else None)
    factors = truncate(weight, analysis.spectrum, rank)
    plan = _make_plan(module, factors, settings)
    factors = balance(factors) if plan.left_format in DTYPES else factors
    layer = build_layer(plan, factors, None, module.bias, weight.dtype)
    model.set_submodule(name, layer)
    curve = {key: float(values[rank]) for key, values in analysis.curves.items()}
    seconds = analysis.seconds + time.perf_counter() - start
    return LayerRecord(
        plan.shape,
        rank,
        plan.method,
        "none",
        stored_bits_per_weight(layer, plan.shape),
        curve.get("calibrated"),
        curve.get("heldout"),
        curve.get("plain"),
        None,
        seconds,
    )


def _split_layer(
    model: nn.Module, name: str, module: Any, moments: dict[str, Moments | None], settings: Settings
) -> LayerRecord:
    start = time.perf_counter()
    weight = weight_of(module)
    calibration, heldout = moments.get("calibration"), moments.get("heldout")
    assert settings.rank is not None and settings.quantizer is not None
    method = settings.method if settings.rank else PlainSVD()  # rank 0 is Q alone whatever the method
    split = method.split(weight, calibration, settings.rank, settings.quantizer)
    plan = _make_plan(module, split.factors, settings)
    factors = balance(split.factors) if plan.left_format in DTYPES else split.factors
    layer = build_layer(plan, factors, split.parts, module.bias, weight.dtype)
    model.set_submodule(name, layer)
    record = LayerRecord(
        plan.shape,
        plan.rank,
        plan.method,
        plan.backbone,
        stored_bits_per_weight(layer, plan.shape),
        error_calibrated=None,
        error_heldout=None,
        error_plain=None,
        error_backbone=None,
        seconds=0.0,
    )
    if calibration is not None and split.backbone is not None:
        remaining = weight.double() - split.backbone
        residual = weight.double() - layer.dense_weight(torch.float64)  # with L and R as they are stored
        first = settings.quantizer.dequantize(settings.quantizer.quantize(weight), plan.shape, torch.float64)
        plain = truncate(weight - first, PlainSVD().spectrum(weight - first, None), settings.rank)
        plain_residual = weight.double() - first - plain.left @ plain.right
        record.error_calibrated = relative_error(residual, weight, calibration, split.centre)
        record.error_heldout = None if heldout is None else relative_error(residual, weight, heldout, split.centre)
        record.error_plain = relative_error(plain_residual, weight, calibration)
        record.error_backbone = relative_error(remaining, weight, calibration)
    record.seconds = time.perf_counter() - start
    return record
