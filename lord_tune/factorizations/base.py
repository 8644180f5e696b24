"""The contract of a factorization, and the truncation that svd, whitened and afm share.

A factorization is a frozen dataclass of its hyperparameters and sees tensors, never a model. It declares the statistics
it `needs` ("input_gram": the moments of the layer's input; "fisher": gradients of the loss by its weight;
"output_gram": the second moment of those by its output); the driver collects only those. `split` returns W ~ Q + L R
(Q absent without a quantizer). Methods whose truncations are nested also give their `spectrum`, from which every rank
is a slice: rank allocation is built on that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from ..declared import option
from ..errors import UsageError
from ..linalg import balanced, principal_axes, row_energies, smaller_side
from ..quantizers import Quantizer
from ..quantizers.ldlq import fitted
from .tails import along, corner_curve, tail_curve


@dataclass(frozen=True)
class Core:
    """A layer seen from its smaller side, k = min(out, in): W = rotation @ matrix."""

    rotation: Tensor | None  # (out, k), orthonormal columns; None for out <= in
    matrix: Tensor  # (k, in) float64
    outputs: Tensor | None  # (k, k) float64: matrix H matrix^T, None without moments

    @classmethod
    def of(cls, weight: Tensor, moments: Moments | None) -> Core:
        rotation, matrix = smaller_side(weight)
        return cls(rotation, matrix, None if moments is None else matrix @ moments.gram @ matrix.T)

    def turned(self, axes: Tensor) -> Tensor:
        """Directions (k, n) of the core as directions (out, n) of the outputs."""
        return axes if self.rotation is None else self.rotation @ axes

    def shifted_outputs(self, centre: Tensor | None, mean: Tensor) -> Tensor:
        """The outputs' second moment for inputs taken relative to `centre`. (k, k)"""
        assert self.outputs is not None
        if centre is None:
            return self.outputs
        shift, average = self.matrix @ centre, self.matrix @ mean
        cross = torch.outer(shift, average)
        return self.outputs - cross - cross.T + torch.outer(shift, shift)


@dataclass(frozen=True)
class Spectrum:
    """A basis of a layer's outputs, most important direction first. W' = B_r D_r^T W: without a dual D the basis B is
    orthonormal and its own dual; with one D^T B = I, and the projection is oblique."""

    basis: Tensor  # (out, k)
    energies: Tensor  # (k,) float64: the squared error of rank r, in the method's norm, is the sum over j >= r
    centre: Tensor | None = None  # (in,): inputs are taken relative to it, its output goes to the bias
    dual: Tensor | None = None  # (out, k)


@dataclass(frozen=True)
class Solution:
    """A spectrum with what it was computed from, so that errors cost no second product with H."""

    spectrum: Spectrum
    core: Core
    axes: Tensor  # (k, k): the basis is rotation @ axes
    dual_axes: Tensor | None = None  # (k, k): the dual is rotation @ dual_axes


@dataclass(frozen=True)
class Fisher:
    """Mean squared gradients of the loss by a weight matrix, over its rows and columns (LQ-LoRA, Guo et al.,
    arXiv 2311.12023, section 3.3)."""

    rows: Tensor  # (out,) float64: sqrt of the mean over j of E[g_ij^2]
    columns: Tensor  # (in,) float64: sqrt of the mean over i


@dataclass(frozen=True)
class Factors:
    """L and R, and what has to be added to the layer's bias (afm only)."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)
    bias_shift: Tensor | None = None  # (out,)
    left_parts: dict[str, Tensor] | None = None  # where the method has rounded L already: its stored parts
    right_parts: dict[str, Tensor] | None = None
    top: Factors | None = None  # the first components, stored apart in a finer format; then L R means what is left
    pivots: Tensor | None = None  # (rank,) int32, where L is P [I; C] already: the rows of L R that R holds; parts: C's

    @property
    def rank(self) -> int:
        return self.left.shape[1] + (0 if self.top is None else self.top.rank)

    def product(self) -> Tensor:
        """L R with the components stored apart. (out, in)"""
        own = self.left @ self.right
        return own if self.top is None else own + self.top.product()


@dataclass(frozen=True)
class Split:
    """W ~ Q + L R."""

    factors: Factors
    parts: dict[str, Tensor] | None = None  # the stored parts of Q
    backbone: Tensor | None = None  # Q, (out, in) float64
    centre: Tensor | None = None  # (in,), see Spectrum
    curve: Tensor | None = None  # (k + 1,) relative error in the method's norm at the ranks 0..k beside this Q
    energy: Tensor | None = None  # E||W x||^2, where it was computed on the way


@dataclass(frozen=True)
class FactorForm:
    """How L and R are stored."""

    quantizer: Quantizer  # of all components but the first `top`
    top: int = 0
    top_form: Quantizer | torch.dtype = torch.float32  # of these
    pivoted: bool = False  # as C and B (pivoting.py), in one piece

    def __post_init__(self) -> None:
        assert self.top == 0 or (self.top > 0 and not self.pivoted)


class Factorization(Protocol):
    """One layer in, its factors out. `Method` has the declarations that most methods share."""

    name: ClassVar[str]
    needs_backbone: ClassVar[bool]  # without Q there is nothing to do
    alternates: ClassVar[bool]  # Q and L R in turn, Q with feedback: its Q alone is not plain rounding
    widths: ClassVar[tuple[str, ...]]  # the backbones that a budget of bits chooses from, narrowest first

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that `split` is given, of "input_gram", "fisher" and "output_gram"."""
        ...

    @property
    def shifts_bias(self) -> bool:
        """Whether every layer it decomposes gets a bias."""
        ...

    @property
    def solves(self) -> int:
        """How often the problem of one layer is solved, for estimates of the time."""
        ...

    @property
    def shrunk(self) -> float | None:
        """The share of the Gram matrix's diagonal in it, for methods that have one."""
        ...

    def candidates(self) -> tuple[Self, ...]:
        """The methods to choose from by held-out error, layer by layer; most are the only one."""
        ...

    def storing(self, form: FactorForm | None) -> Self:
        """The method for L and R stored in this form, where it rounds them itself."""
        ...

    def split(
        self,
        weight: Tensor,  # (out, in)
        moments: Moments | None,
        rank: int,
        quantizer: Quantizer | None,
        heldout: InputStatistics | None = None,  # for choices that would overfit the calibration text
        fisher: Fisher | None = None,  # where `needs` names it
        output_gram: Tensor | None = None,  # (out, out), where `needs` names it
    ) -> Split: ...


def truncate(
    weight: Tensor,  # (out, in)
    spectrum: Spectrum,
    rank: int,
) -> Factors:
    """L = B_r, R = D_r^T W; with a centre mu also the bias shift (I - B_r D_r^T) W mu. float64."""
    limit = spectrum.basis.shape[1]
    if not 0 <= rank <= limit:
        raise UsageError(f"Got rank {rank} for a {tuple(weight.shape)} matrix; expected 0 to {limit}.")
    w = weight.double()
    left = spectrum.basis[:, :rank].to(w.device, torch.float64, copy=True)  # a view would hold the basis
    dual = left if spectrum.dual is None else spectrum.dual[:, :rank].to(w)
    right = dual.T @ w
    if spectrum.centre is None:
        return Factors(left, right)
    output_mean = w @ spectrum.centre.to(w)
    return Factors(left, right, output_mean - left @ (dual.T @ output_mean))


def calibrated_curve(
    solution: Solution,
    moments: Moments | None,  # None: the method's own energies are the errors
    reference: Tensor,  # the energy that errors are relative to
) -> Tensor:
    """The relative error of the solution cut at the ranks 0..k. (k + 1,)"""
    core, axes, dual = solution.core, solution.axes, solution.dual_axes
    if moments is None:
        return tail_curve(solution.spectrum.energies, reference)
    assert core.outputs is not None, "the solution is of these moments"
    if dual is None:
        return tail_curve(along(axes, core.shifted_outputs(solution.spectrum.centre, moments.mean)), reference)
    return corner_curve((axes.T @ axes) * (dual.T @ core.outputs @ dual), reference)


def balance(factors: Factors) -> Factors:
    """The same factors scaled for training (equal gradient scale); without it L has orthonormal columns."""
    left, right = balanced(factors.left, factors.right)
    return dataclasses.replace(factors, left=left, right=right)


class Method:
    """What a method declares unless it says otherwise."""

    needs_backbone: ClassVar[bool] = False
    alternates: ClassVar[bool] = False
    widths: ClassVar[tuple[str, ...]] = ("lloyd2", "lloyd3", "lloyd4", "int8")

    @property
    def shifts_bias(self) -> bool:
        return False

    @property
    def solves(self) -> int:
        return 1

    @property
    def shrunk(self) -> float | None:
        return None

    def candidates(self) -> tuple[Self, ...]:
        return (self,)

    def storing(self, form: FactorForm | None) -> Self:
        return self


@dataclass(frozen=True)
class Metric:
    """The norm in which an error of the outputs is measured, y^T (scale matrix) y, in a core's coordinates."""

    matrix: Tensor  # (k, k) float64, positive definite
    scale: float  # 0 where nothing is measured at all


def rounding_option() -> Any:
    """The field `rounding` of methods that know the inputs' second moment."""
    text = "how Q is rounded: with error feedback on the calibration text (LDLQ), or to the nearest, as a baseline"
    return option("feedback", text, without_q=False)


class Projection(Method):
    """Base of the methods whose optimum is a projection of the outputs.

    It is orthogonal, W' = U_r U_r^T W, in the plain norm: U are the eigenvectors of a second moment M of the outputs
    that the method chooses (`selection`). With a `metric` C C^T it is oblique: W' = (C^-T V_r) (C V_r)^T W with V the
    eigenvectors of C^T M C.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    rounding = "nearest"  # of Q; methods that know the inputs have an option

    def selection(self, core: Core, moments: Moments | None) -> tuple[Tensor, Tensor | None]:
        """The (k, k) moment, in the core's coordinates, whose eigenvectors are the basis; and the centre (in,)."""
        raise TypeError(f"{type(self).__name__} has to define selection")

    def metric(self, core: Core, output_gram: Tensor | None) -> Metric | None:
        """None: every error of the outputs weighs alike."""
        return None

    def solve(self, weight: Tensor, moments: Moments | None, output_gram: Tensor | None = None) -> Solution:
        core = Core.of(weight, moments)
        moment, centre = self.selection(core, moments)
        metric = self.metric(core, output_gram)
        if metric is None:
            energies, axes = principal_axes(moment)
            return Solution(Spectrum(core.turned(axes), energies, centre), core, axes)
        root = torch.linalg.cholesky(metric.matrix)
        energies, vectors = principal_axes(root.T @ moment @ root)
        axes, dual = torch.linalg.solve_triangular(root.T, vectors, upper=True), root @ vectors
        spectrum = Spectrum(core.turned(axes), metric.scale * energies, centre, core.turned(dual))
        return Solution(spectrum, core, axes, dual)

    def energies(
        self,
        weight: Tensor,
        moments: Moments | None,
        output_gram: Tensor | None,
        ranked: bool,
        noticed: Tensor | None = None,  # (in, in): H_g of calibration/sensitivity.py, see `foreseen`
    ) -> Tensor:
        """Those of `solve`, without its basis: (k,), or where no rank is asked for their sum, (1,)."""
        core = Core.of(weight, moments)
        moment, _ = self.selection(core, moments)
        metric = self.metric(core, output_gram)
        if metric is None:
            return moment.trace().reshape(1) if not ranked else _eigenvalues(moment)
        other = None if noticed is None else core.matrix @ noticed.to(core.matrix) @ core.matrix.T
        if not ranked:
            whole = (metric.matrix * moment).sum().reshape(1)
            if other is not None:
                whole = foreseen(whole, (metric.matrix * other).sum().reshape(1))
            return metric.scale * whole
        root = torch.linalg.cholesky(metric.matrix)
        moment = root.T @ moment @ root
        if other is None:
            return metric.scale * _eigenvalues(moment)
        energies, axes = principal_axes(moment)
        return metric.scale * foreseen(energies, row_energies((root @ axes).T, other).clamp_min(0))

    def spectrum(self, weight: Tensor, moments: Moments | None, output_gram: Tensor | None = None) -> Spectrum:
        return self.solve(weight, moments, output_gram).spectrum

    def split(
        self,
        weight: Tensor,
        moments: Moments | None,
        rank: int,
        quantizer: Quantizer | None,
        heldout: InputStatistics | None = None,
        fisher: Fisher | None = None,
        output_gram: Tensor | None = None,
    ) -> Split:
        """Quantize W first if asked to, then factor the residual W - Q."""
        w = weight.double()
        reference = w.square().sum() if moments is None else moments.energies(w).sum()
        energy = None if moments is None else reference
        parts, backbone = None, None
        if quantizer is not None:
            parts, backbone = self.rounded(weight, moments, quantizer, heldout)
            w = w - backbone
        if rank == 0:  # Q alone
            return Split(Factors(w[:, :0], w[:0]), parts, backbone, energy=energy)
        solution = self.solve(w, moments, output_gram)
        factors, curve = truncate(w, solution.spectrum, rank), calibrated_curve(solution, moments, reference)
        return Split(factors, parts, backbone, solution.spectrum.centre, curve, energy)

    def rounded(
        self, weight: Tensor, moments: Moments | None, quantizer: Quantizer, heldout: InputStatistics | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(stored parts, Q float64)"""
        if self.rounding == "nearest" or moments is None:
            parts = quantizer.quantize(weight)
            return parts, quantizer.dequantize(parts, (weight.shape[0], weight.shape[1]), torch.float64)
        gram, energies = quantizer.turned_gram(moments.gram), heldout_energies(quantizer, heldout)
        found = fitted(quantizer, weight, gram, energies, shared=moments.shared_gram)
        return found.parts, found.backbone


MASSIVE = 0.5  # of what H foresees; below it tokens that the loss hardly notices make the rest


def foreseen(energies: Tensor, noticed: Tensor) -> Tensor:
    """Of two predictions of what rounding costs the loss, direction by direction, that of H, unless H_g foresees less
    than half of it: then massive activations make the difference, and K-FAC's assumption fails. Elsewhere H_g, whose
    tokens weigh as unevenly as their gradients, is the less certain of the two (scripts/RESULTS.md)."""
    return noticed if bool(noticed.sum() < MASSIVE * energies.sum()) else energies


def _eigenvalues(moment: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh((moment + moment.T) / 2)
    return values.flip(0).clamp_min(0)


def heldout_energies(quantizer: Quantizer, heldout: InputStatistics | None) -> Callable[[Tensor], Tensor] | None:
    """The squared errors, on held-out text, of rows in the coordinates of the format."""
    return None if heldout is None else lambda rows: heldout.energies(quantizer.returned_inputs(rows))
