"""What is done with one layer, given its weight, the statistics of its input and its choice. No model, no files.

Two orders of work. When the rank is known, a layer is split and stored at once (`split_layer`, `project_layer`). When
an allocator first needs the spectra of all layers, `analyse` keeps the layer's basis (float32) and error curves, never
its Gram matrix, and `install` cuts the factors from them later: ranks are slices.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from torch import Tensor, nn

from ..allocation import PLAIN, break_even
from ..calibration.moments import InputStatistics, Moments
from ..factorizations import (
    Factorization,
    Factors,
    Fisher,
    PlainSVD,
    Projection,
    Solution,
    Spectrum,
    balance,
    calibrated_curve,
    error_curves,
    round_factors,
    thinned,
    truncate,
)
from ..layers import FactoredLinear, bias_of, build_layer, is_transposed, shape_of, weight_of
from ..memory import give_back
from ..plans import LayerChoice
from ..quantizers import DTYPES, Quantizer
from .base import LayerRecord
from .choices import Noise
from .judging import COMPARED_INPUTS, equal_bits, judge, measure_stored
from .noise import Formats, noise_by_format, noise_of, noise_tensors

_CURVES = ("calibrated", "heldout", "plain", "beyond_top")


class Facts(TypedDict):
    """What a layer's record says beside its errors."""

    seconds: float
    shrinkage: float | None
    inputs: dict[str, float]
    warnings: list[str]


@dataclass(frozen=True)
class Analysis:
    """What is kept of a layer between the walk and the choice of its rank."""

    spectrum: Spectrum
    curves: dict[str, Tensor]  # relative error at rank 0..k
    facts: Facts
    noise: dict[str, Noise] = field(default_factory=dict)  # backbone -> what it does to the outputs

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        found = {"basis": self.spectrum.basis, "energies": self.spectrum.energies}
        if self.spectrum.dual is not None:
            found["dual"] = self.spectrum.dual
        if self.spectrum.centre is not None:
            found["centre"] = self.spectrum.centre.clone()  # layers with one input share it, tensors of a file do not
        found |= noise_tensors(self.noise)
        return found | {f"curve.{name}": curve for name, curve in self.curves.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: Facts) -> Analysis:
        curves = {name: tensors[f"curve.{name}"] for name in _CURVES if f"curve.{name}" in tensors}
        spectrum = Spectrum(tensors["basis"], tensors["energies"], tensors.get("centre"), tensors.get("dual"))
        return cls(spectrum, curves, facts, noise_of(tensors))


@dataclass(frozen=True)
class Finished:
    """A layer's record, and its replacement unless it stays dense."""

    record: LayerRecord
    layer: FactoredLinear | None = None


def analyse(
    weight: Tensor,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    method: Projection,
    limit: int | None,  # directions to keep; None: also those beyond break-even, which the loss weighs when dropped
    output_gram: Tensor | None = None,
    form: str = PLAIN,  # in which the factors will be stored
    formats: Formats | None = None,  # to be measured beside W = L R
    noticed: Tensor | None = None,  # (in, in): H_g, by which noise is foreseen, see Projection.energies
    gram_beside: Tensor | None = None,  # (out, out): what weighs the outputs beside the formats, output_gram if None
) -> Analysis:
    """Basis and error curves at every rank."""
    start = time.perf_counter()
    chosen, solution, curves = _solve(weight, calibration, heldout, method, None, form, output_gram)
    spectrum = solution.spectrum
    noise = {}
    if formats:
        assert calibration is not None, "these budgets are shared out on calibration text"
        weighing = output_gram if gram_beside is None else gram_beside
        noise = noise_by_format(weight, spectrum.basis, calibration, chosen, formats, weighing, noticed)
    whole = spectrum.basis.shape[1]
    keep = whole if limit is None else min(max(limit, 1), whole)
    dual = None if spectrum.dual is None else spectrum.dual[:, :keep].float().contiguous()
    kept = Spectrum(spectrum.basis[:, :keep].float().contiguous(), spectrum.energies, spectrum.centre, dual)
    facts = _facts(chosen, calibration, output_gram)
    facts["seconds"] = time.perf_counter() - start
    return Analysis(kept, curves, facts, noise)


def _facts(method: Factorization, calibration: Moments | None, output_gram: Tensor | None) -> Facts:
    unnoticed = output_gram is not None and not bool(output_gram.diagonal().any())
    return Facts(
        seconds=0.0,
        shrinkage=method.shrunk,
        inputs={} if calibration is None else calibration.describe(),
        warnings=[NO_GRADIENT] if unnoticed else [],
    )


NO_GRADIENT = "the loss has no gradient at its outputs on the text of the backward pass, so they all weigh alike"


def _solve(
    weight: Tensor,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    method: Projection,
    rank: int | None,
    form: str = PLAIN,
    output_gram: Tensor | None = None,
) -> tuple[Projection, Solution, dict[str, Tensor]]:
    """Of the method's candidates the one with the least held-out error (at `rank`, or on average over the ranks below
    break-even), its solution and its error curves. Without held-out text the first candidate is taken."""
    candidates = method.candidates()
    if len(candidates) == 1 or heldout is None:
        solution = candidates[0].solve(weight, calibration, output_gram)
        curves = {} if calibration is None else error_curves(solution, calibration, heldout)
        return candidates[0], solution, curves
    assert calibration is not None, "held-out text comes with calibration text"
    limit = min(break_even((weight.shape[0], weight.shape[1]), form), min(weight.shape))
    best: tuple[Projection, Solution, dict[str, Tensor]] | None = None
    least = float("inf")
    for candidate in candidates:
        solution = candidate.solve(weight, calibration, output_gram)
        curves = error_curves(solution, calibration, heldout)
        curve = curves["heldout"]
        error = float(curve[rank]) if rank is not None else float(curve[: limit + 1].mean())
        if best is None or error < least:
            best, least = (candidate, solution, curves), error
    assert best is not None, "a method has at least one candidate"
    return best


def install(module: nn.Module, analysis: Analysis, choice: LayerChoice) -> Finished:
    """Cut the factors of the chosen rank from the analysis."""
    start = time.perf_counter()
    assert choice.rank is not None, "layers that stay dense are not installed"
    layer = _build(module, truncate(weight_of(module), analysis.spectrum, choice.rank), None, choice)
    record = _record(layer, analysis.curves, choice.rank, analysis.facts)
    record.seconds += time.perf_counter() - start
    return Finished(record, layer)


def project_layer(
    module: nn.Module,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    choice: LayerChoice,
    output_gram: Tensor | None = None,
) -> Finished:
    """The whole way at a known rank, without a backbone."""
    start = time.perf_counter()
    method, rank = choice.factorization(), choice.rank
    assert isinstance(method, Projection) and rank is not None, "the plan gives no other choice without a backbone"
    weight = weight_of(module)
    chosen, solution, curves = _solve(weight, calibration, heldout, method, rank, choice.form, output_gram)
    centre = solution.spectrum.centre
    factors = _rounded(truncate(weight, solution.spectrum, rank), weight, calibration, choice, centre)
    layer = _build(module, factors, None, choice)
    record = _record(layer, curves, rank, _facts(chosen, calibration, output_gram))
    if calibration is None:
        record.spectrum = thinned(calibrated_curve(solution, None, weight.double().square().sum()))
    if choice.rounds_factors and calibration is not None:
        measure_stored(record, layer, weight, calibration, heldout, centre)
    record.seconds = time.perf_counter() - start
    return Finished(record, layer)


def _rounded(
    factors: Factors, target: Tensor, calibration: Moments | None, choice: LayerChoice, centre: Tensor | None
) -> Factors:
    """L and R rounded with feedback to fit `target`, where they are stored in a quantized format.

    Data-free methods stay data-free: they would be no baseline otherwise.
    """
    form = choice.factor_form()
    if form is None:
        return factors
    needs = choice.factorization().needs
    # a centred method leaves W's mean to the bias, and one that weighs the outputs would be fitted to others
    aim = target.double() if centre is None and "output_gram" not in needs else factors.product()
    weighed = calibration is not None and "input_gram" in needs
    stored = round_factors(aim, calibration.gram if weighed else None, factors, form)  # type: ignore[union-attr]
    if centre is None:
        return stored
    return dataclasses.replace(stored, bias_shift=(target.double() - stored.product()) @ centre.double())


def split_layer(
    module: nn.Module,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    choice: LayerChoice,
    fisher: Fisher | None = None,
    compare: bool = False,  # with feedback rounding alone at other widths
    output_gram: Tensor | None = None,
    judged: bool = True,  # with its errors, which take as long as the layer
    given: dict[str, Tensor] | None = None,  # the parts of Q, where it is not for the method to choose
) -> Finished:
    """W = Q + L R with a quantized backbone."""
    start = time.perf_counter()
    weight, rank, quantizer = weight_of(module), choice.rank, choice.quantizer()
    if given is not None:
        quantizer = cast(Quantizer, Fixed(quantizer, given))
    assert quantizer is not None and rank is not None, "the plan gives a rank beside every backbone"
    method: Factorization = choice.factorization()
    alternates = method.alternates  # its Q alone is not plain rounding
    if rank == 0 and not isinstance(method, Projection) and not alternates:
        method = PlainSVD()  # Q alone
    if isinstance(method, Projection):
        method = _fitted(method, weight, calibration, heldout, choice)
    method = method.storing(choice.factor_form())
    split = method.split(weight, calibration, rank, quantizer, heldout, fisher, output_gram)
    assert split.backbone is not None
    factors = split.factors
    if not alternates:
        factors = _rounded(factors, weight.double() - split.backbone, calibration, choice, split.centre)
    layer = _build(module, factors, split.parts, choice)
    record = _record(layer, {}, rank, _facts(method, None, output_gram if rank else None))
    record.spectrum = None if split.curve is None else thinned(split.curve)
    if calibration is not None and judged:
        centre, energy = split.centre, split.energy
        del split, factors
        give_back()
        judge(record, layer, weight, quantizer, calibration, heldout, centre, energy)
        record.inputs = calibration.describe()
        if compare and weight.shape[1] <= COMPARED_INPUTS:
            record.equal_bits = equal_bits(weight, calibration, heldout)
    record.seconds = time.perf_counter() - start
    return Finished(record, layer)


class Fixed:
    """A format whose plain rounding is known already."""

    def __init__(self, form: Any, parts: dict[str, Tensor]):
        self._form, self._parts = form, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self._parts


def _fitted(
    method: Projection,
    weight: Tensor,
    calibration: Moments | None,
    heldout: InputStatistics | None,
    choice: LayerChoice,
) -> Projection:
    """The candidate that errs least on held-out text for what rounding leaves of the weight."""
    if len(method.candidates()) == 1 or heldout is None or not choice.rank:
        return method.candidates()[0]
    quantizer = choice.quantizer()
    assert quantizer is not None
    _, backbone = method.rounded(weight, calibration, quantizer, heldout)
    return _solve(weight.double() - backbone, calibration, heldout, method, choice.rank)[0]


def left_dense(module: nn.Module, seconds: float, reason: str | None) -> Finished:
    """The record of a layer that stays as it is."""
    bits = 8.0 * weight_of(module).element_size()
    notes = [f"left dense: {reason}"] if reason else []
    record = LayerRecord(shape_of(module), "dense", "dense", "none", bits, 0.0, 0.0, 0.0, None, seconds, warnings=notes)
    return Finished(record)


def stored_bits_per_weight(layer: nn.Module, shape: tuple[int, int]) -> float:
    """Bits of all stored tensors of a layer but its bias, per weight of the dense matrix."""
    size = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")
    return 8.0 * size / (shape[0] * shape[1])


def _build(module: nn.Module, factors: Factors, parts: dict[str, Tensor] | None, choice: LayerChoice) -> FactoredLinear:
    dtype, bias = weight_of(module).dtype, bias_of(module)
    plan = choice.on(shape_of(module), dtype, bias is not None, is_transposed(module))
    assert factors.rank == plan.rank and (factors.bias_shift is None or plan.bias), "the method did as planned"
    factors = balance(factors) if plan.left_format in DTYPES and plan.form == PLAIN else factors
    return build_layer(plan, factors, parts, bias, dtype)


def _record(layer: FactoredLinear, curves: dict[str, Tensor], rank: int, facts: Facts) -> LayerRecord:
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
        warnings=list(facts["warnings"]),
        form=plan.form,
        spectrum=thinned(curves["calibrated"]) if "calibrated" in curves else None,
    )
