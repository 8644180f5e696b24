"""CALDERA (Saha et al., arXiv 2405.18886, algorithm 1): W ~ Q + L R by alternation, all three in low precision.

    min tr((W - Q - L R) H (W - Q - L R)^T)

Q step: LDLQ on W - L R, in the format's rotated coordinates if it has them (quantizers/incoherence.py). L R step: the
optimal rank-r factors of W - Q, U_r and U_r^T (W - Q) with U the eigenvectors of (W - Q) H (W - Q)^T, no inverse; with
a factor form they are rounded as rounding.py does.

Feedback for directions that L R carries is wasted: the down-dated Gram matrix H - H R^T (R H R^T)^-1 R H (a Schur
complement; the paper subtracts the top right singular vectors of L R H^(1/2), which span the same space) helps as far
as L R carries them exactly. With `downdate="auto"` the first iteration tries both and the best goes on.

Either Q or L R is fitted to W first (the paper's algorithm and its authors' scripts differ). L R first is 4-11 % better
with 16-bit factors, Q first a few percent with 4-bit ones, on the layers that scripts/bench_caldera.py measures, so the
first iteration tries both (`order="auto"`).

`order="outliers"` (ODLRI, arXiv 2506.02077) is L R first, of the salient input channels S alone: the 2 r of largest
H_jj. L R is the best rank-r approximation of W_S in the norm of H_SS and zero at all other channels; Q then is rounded
to what is left, and the alternation goes on as usual. That there are 2 r of them is our choice, not the paper's. `auto`
does not try it: scripts/RESULTS.md has what it gives.

The best iterate on H is returned: more iterations are never worse. The first iterate has L R = 0, LDLQ alone, so the
result never is worse than that. The damping of H and the stretch of each row's scales are chosen on that first Q: the
damping by held-out error where held-out text is given, because feedback fits to noise.

`weighting="fisher"` replaces H by the diagonal of the squared gradients' column means and weighs the rows by their row
means (LQ-LoRA, Guo et al., arXiv 2311.12023, section 3.3): the same two steps for another norm. Row weights decide L R;
rows of Q are rounded one by one, where they change nothing (in rotated coordinates rows mix, and they are left out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from ..declared import option
from ..errors import UsageError
from ..linalg import principal_axes, smaller_side, solve_psd
from ..quantizers import Quantizer
from ..quantizers.ldlq import DAMPINGS, Feedback, fitted, round_with_feedback
from .base import FactorForm, Factors, Fisher, Method, Split, heldout_energies
from .rounding import energy_left, factor_feedback, plainly_rounded, refine
from .tails import tail_curve

_SALIENT = 2  # input channels for each rank, to which `order="outliers"` fits L R first


@dataclass(frozen=True)
class Caldera(Method):
    """Alternation of LDLQ and activation-aware low rank."""

    name: ClassVar[str] = "caldera"
    needs_backbone: ClassVar[bool] = True
    alternates: ClassVar[bool] = True
    widths: ClassVar[tuple[str, ...]] = ("e8-2", "e8-3", "e8-4", "int8")
    iterations: int = option(6, "alternations of Q and L R", at_rank_0=False, gt=0)
    downdate: Literal["auto", "on", "off"] = option(
        "auto", "spend no feedback on directions that L R carries; auto keeps the better", at_rank_0=False
    )
    order: Literal["auto", "q", "lr", "outliers"] = option(
        "auto",
        "what is fitted to W first, Q or L R, or L R to the channels of the largest inputs (ODLRI); auto keeps the "
        "better of q and lr",
        at_rank_0=False,
    )
    weighting: Literal["activations", "fisher"] = option(
        "activations",
        "what an error costs: by the inputs' second moment, or by row and column means of squared gradients (LQ-LoRA)",
    )
    factor_form: FactorForm | None = None  # None: L and R stay as they are (16 bits or more)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"input_gram"} if self.weighting == "activations" else {"input_gram", "fisher"})

    @property
    def solves(self) -> int:
        return self.iterations

    def storing(self, form: FactorForm | None) -> Caldera:
        return replace(self, factor_form=form)

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
        if quantizer is None:
            raise UsageError("CALDERA splits W into Q + L R and needs a quantized backbone; pass `backbone` e8-2.")
        assert moments is not None, "the driver collects what `needs` names"
        if not 0 <= rank <= min(weight.shape):
            limit = min(weight.shape)
            raise UsageError(f"Got rank {rank} for a {tuple(weight.shape)} matrix; expected 0 to {limit}.")
        assert fisher is not None or self.weighting == "activations", "the driver measures what `needs` names"
        weighting = fisher if self.weighting == "fisher" else None
        problem = _Problem(weight.double(), moments, heldout, quantizer, weighting, self.factor_form)
        start = problem.start()
        if rank == 0:
            return start.split
        downdates = {"auto": (False, True), "on": (True,), "off": (False,)}[self.downdate]
        best, tried = start, []
        for order in ("q", "lr") if self.order == "auto" else (self.order,):
            if order == "outliers":
                first = problem.of_outliers(start, rank)
            else:
                first = problem.with_factors(start if order == "q" else problem.nothing(start), rank)
            best = min(best, first, key=_error) if order == "q" else best  # L R of W itself comes without a Q
            for downdate in downdates:
                run = problem.iterate(first, rank, downdate)
                best = min([best, *run], key=_error)
                tried.append((run[-1], downdate))
        current, downdate = min(tried, key=lambda pair: pair[0].error)
        for _ in range(self.iterations - 1):
            run = problem.iterate(current, rank, downdate)
            best = min([best, *run], key=_error)
            current = run[-1]
        return best.split if best.split.factors.rank else problem.idle(best, rank)


def feedback_alone(
    weight: Tensor,
    moments: Moments,
    quantizers: list[Quantizer],
    heldout: InputStatistics | None = None,
) -> Iterator[Split]:
    """Rounding with feedback in several formats, without L R; all in the damping that the first one chose."""
    dampings = DAMPINGS
    for quantizer in quantizers:
        problem = _Problem(weight.double(), moments, heldout, quantizer, None, None, dampings)
        split = problem.start().split
        dampings = (problem.damping,)
        del problem
        yield split
        del split


@dataclass(frozen=True)
class _Iterate:
    error: float
    split: Split


def _error(iterate: _Iterate) -> float:
    return iterate.error


@dataclass(frozen=True)
class _Rest:
    """What Q leaves of a weight."""

    matrix: Tensor  # W - Q, (out, in) float64
    reach: Tensor | None  # (W - Q) H, (out, in), where it is needed


class _Problem:
    """One layer: its weight, its Gram matrix in both coordinate systems, and the choices made on the first Q."""

    def __init__(
        self,
        weight: Tensor,  # (out, in) float64
        moments: Moments,
        heldout: InputStatistics | None,
        quantizer: Quantizer,
        fisher: Fisher | None,
        factor_form: FactorForm | None,
        dampings: tuple[float, ...] = DAMPINGS,
    ):
        self.weight, self.quantizer, self.form, self.dampings = weight, quantizer, factor_form, dampings
        self.heldout = heldout if fisher is None else None  # judged in the same norm as all else
        self.gram, self.rows, self.shared = moments.gram, None, moments.shared_gram
        if fisher is not None:
            self.gram = torch.diag(_bounded(fisher.columns).square()).to(weight)
            self.rows, self.shared = _bounded(fisher.rows).to(weight), None
        self.rounding_gram = quantizer.turned_gram(self.gram)
        self.block = quantizer.block
        self.damping = self.dampings[0]
        self.stretch: Tensor | float = 1.0
        self.energy = self._energies(weight).sum().clamp_min(1e-300)
        self.factor_feedback = None if factor_form is None else factor_feedback(factor_form, self.gram)
        self._plain: Feedback | None = None  # without down-date
        self._root: Tensor | None = None  # H^(1/2), for tall matrices

    def _weighted(self, matrix: Tensor) -> Tensor:
        return matrix if self.rows is None else self.rows[:, None] * matrix

    def _energies(self, residual: Tensor) -> Tensor:
        """Of each row. (out,)"""
        rows = self._weighted(residual)
        return (rows @ self.gram * rows).sum(1)

    def _iterate(self, parts: dict[str, Tensor], backbone: Tensor, factors: Factors | None) -> _Iterate:
        residual = self.weight - backbone if factors is None else self.weight - backbone - factors.product()
        empty = Factors(self.weight[:, :0], self.weight[:0])
        error = float(self._energies(residual).sum() / self.energy)
        return _Iterate(error, Split(factors or empty, parts, backbone))

    def start(self) -> _Iterate:
        """LDLQ alone, after choosing the damping and, for every row, the stretch of its scales."""
        found = fitted(
            self.quantizer,
            self.weight,
            self.rounding_gram,
            heldout_energies(self.quantizer, self.heldout),
            self.dampings,
            shared=self.shared,
        )
        self.damping, self.stretch, self._plain = found.damping, found.stretch, found.feedback
        return self._iterate(found.parts, found.backbone, None)

    def idle(self, alone: _Iterate, rank: int) -> Split:
        """Q alone, with L = 0 beside the strongest directions of the inputs as R: nothing to add, but it can train."""
        _, axes = principal_axes(self.gram)
        left, right = self.weight.new_zeros(len(self.weight), rank), axes[:, :rank].T.contiguous()
        factors = Factors(left, right) if self.form is None else plainly_rounded(Factors(left, right), self.form)
        return replace(alone.split, factors=factors)

    def nothing(self, start: _Iterate) -> _Iterate:
        """Q = 0, from which L R is that of W itself; its parts mean nothing."""
        assert start.split.parts is not None
        return _Iterate(1.0, replace(start.split, backbone=torch.zeros_like(self.weight)))

    def of_outliers(self, start: _Iterate, rank: int) -> _Iterate:
        """No Q, and the best L R of the channels with the largest inputs alone."""
        parts = start.split.parts
        assert parts is not None
        channels = self.gram.diagonal().topk(min(_SALIENT * rank, len(self.gram))).indices
        weighted = self._weighted(self.weight)[:, channels]
        rotation, core = smaller_side(weighted)
        _, axes = principal_axes(core @ self.gram[channels][:, channels] @ core.T)
        basis = axes[:, :rank] if rotation is None else rotation @ axes[:, :rank]
        right = self.weight.new_zeros(rank, self.weight.shape[1])
        right[:, channels] = basis.T @ weighted
        factors = self._scaled(basis, right)
        if self.form is not None:
            factors = plainly_rounded(factors, self.form)
        return self._iterate(parts, torch.zeros_like(self.weight), factors)

    def iterate(self, before: _Iterate, rank: int, downdate: bool) -> list[_Iterate]:
        """The Q step for these factors, and the L R step after it; both iterates. Of L R that are not rounded the
        second alone: they are the best for this Q."""
        factors = before.split.factors
        feedback = self._feedback(factors, downdate)
        parts, backbone = round_with_feedback(self.quantizer, self.weight - factors.product(), feedback, self.stretch)
        split, rest = Split(factors, parts, backbone), self._rest(backbone)
        if self.form is None:
            return [self._factored(_Iterate(math.inf, split), rank, rest)]
        rounded = _Iterate(self._relative(rest, factors), split)
        return [rounded, self._factored(rounded, rank, rest)]

    def with_factors(self, before: _Iterate, rank: int) -> _Iterate:
        """The optimal L R for this Q."""
        assert before.split.backbone is not None
        return self._factored(before, rank, self._rest(before.split.backbone))

    def _factored(self, before: _Iterate, rank: int, rest: _Rest) -> _Iterate:
        factors, energies = self._optimal(rest, rank)
        curve = tail_curve(energies, self.energy)
        if self.form is None:
            error = float(energies[rank:].sum() / self.energy)
        else:
            assert self.factor_feedback is not None and rest.reach is not None
            form, feedback = self.form, self.factor_feedback
            factors = refine(rest.matrix, self.gram, factors, form, feedback, self.rows, reach=rest.reach)
            error = self._relative(rest, factors)
        return _Iterate(error, replace(before.split, factors=factors, curve=curve))

    def _rest(self, backbone: Tensor) -> _Rest:
        matrix = self.weight - backbone
        tall = matrix.shape[0] > matrix.shape[1]
        return _Rest(matrix, None if tall and self.form is None else matrix @ self.gram)

    def _relative(self, rest: _Rest, factors: Factors) -> float:
        """Of Q and L R, relative."""
        assert rest.reach is not None
        left, right = _whole(factors)
        whole = float((self._weighted(rest.matrix) * self._weighted(rest.reach)).sum())
        wanted, inner = self._weighted(rest.reach @ right.T), right @ self.gram @ right.T
        return energy_left(whole, self._weighted(left), wanted, inner) / float(self.energy)

    def _optimal(self, rest: _Rest, rank: int) -> tuple[Factors, Tensor]:
        """L and R, balanced, of the best rank-r approximation of the residual's outputs; the energy of every component,
        of which those from r on are left."""
        weighted = self._weighted(rest.matrix)
        out, inputs = weighted.shape
        if out > inputs and 4 * rank <= inputs:  # the small side is that of the inputs; no QR of the whole residual
            if self._root is None:
                input_energies, vectors = principal_axes(self.gram)
                self._root = vectors * input_energies.sqrt()
            seen = weighted @ self._root
            energies, axes = principal_axes(seen.T @ seen)
            basis = torch.linalg.qr(seen @ axes[:, :rank]).Q
        else:
            rotation, core = smaller_side(weighted)
            reach = core @ self.gram if rotation is not None else self._weighted(rest.reach)  # type: ignore[arg-type]
            energies, axes = principal_axes(reach @ core.T)
            basis = axes[:, :rank] if rotation is None else rotation @ axes[:, :rank]
        return self._scaled(basis, basis.T @ weighted), energies

    def _scaled(self, basis: Tensor, right: Tensor) -> Factors:
        """L and R, balanced, of directions and what they carry of the weighted residual."""
        scale = right.norm(dim=1).clamp_min(1e-300).sqrt()
        left = basis * scale
        return Factors(left if self.rows is None else left / self.rows[:, None], right / scale[:, None])

    def _feedback(self, factors: Factors, downdate: bool) -> Feedback:
        if downdate:
            right = self.quantizer.turned_inputs(_whole(factors)[1])
            reach = right @ self.rounding_gram
            rest = self.rounding_gram - reach.T @ solve_psd(reach @ right.T, reach)
            rest = (rest + rest.T) / 2
            for damping in (self.damping, *(d for d in DAMPINGS if d > self.damping)):
                try:
                    return Feedback.of(rest, damping, self.block)
                except torch.linalg.LinAlgError:  # L R carries all of H, and what is left is rounding
                    continue
        if self._plain is None:
            self._plain = Feedback.of(self.rounding_gram, self.damping, self.block)
        return self._plain


def _whole(factors: Factors) -> tuple[Tensor, Tensor]:
    """L and R with the components that are stored apart."""
    if factors.top is None:
        return factors.left, factors.right
    return torch.cat([factors.top.left, factors.left], 1), torch.cat([factors.top.right, factors.right])


def _bounded(weights: Tensor) -> Tensor:
    """Weights relative to their mean, none below a thousandth: a dead row or column must not divide by zero."""
    mean = weights.mean()
    if not float(mean) > 0:
        return torch.ones_like(weights)
    return (weights / mean).clamp_min(1e-3)
