"""CALDERA (Saha et al., arXiv 2405.18886, algorithm 1): W ~ Q + L R by alternation, all three in low precision.

    min tr((W - Q - L R) H (W - Q - L R)^T)

Q step: LDLQ on W - L R, in the format's rotated coordinates if it has them (quantizers/incoherence.py). L R step: the
optimal rank-r factors of W - Q, U_r and U_r^T (W - Q) with U the eigenvectors of (W - Q) H (W - Q)^T, no inverse; with
a factor format, LPLR: alternately L = A H R^T (R H R^T)^-1 and R = L^+ A, each rounded, the best pair kept.

Feedback for directions that L R carries is wasted: the down-dated Gram matrix H - H R^T (R H R^T)^-1 R H (a Schur
complement; the paper subtracts the top right singular vectors of L R H^(1/2), which span the same space) helps 16-bit
factors and hurts 4-bit ones, so with `downdate="auto"` both are tried.

The best iterate on H is returned: more iterations are never worse. The first iterate has L R = 0, LDLQ alone, so the
result never is worse than that. The damping of H and the stretch of the scales are chosen on that first Q: the damping
by held-out error where held-out text is given, because feedback fits to noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from ..errors import UsageError
from ..linalg import principal_axes, smaller_side
from ..quantizers.ldlq import Feedback, choose, ldlq
from .base import Factors, Split

DAMPINGS = (0.01, 0.1, 0.3)
STRETCHES = (0.92, 1.0, 1.08)


@dataclass(frozen=True)
class Caldera:
    """Alternation of LDLQ and activation-aware low rank."""

    name: ClassVar[str] = "caldera"
    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})
    iterations: int = 6  # 0: LDLQ alone where the rank is 0
    inner_iterations: int = 5  # of LPLR, with a factor format
    downdate: str = "auto"  # auto, on, off
    factor_format: Any = None  # a Quantizer for L and R, or None: 16 bits or more

    def split(
        self,
        weight: Tensor,
        moments: Moments | None,
        rank: int,
        quantizer: Any,
        heldout: InputStatistics | None = None,
    ) -> Split:
        if not hasattr(getattr(quantizer, "inner", quantizer), "rounder"):
            raise UsageError("CALDERA needs a backbone that can be rounded with feedback; pass --backbone e8-2.")
        assert moments is not None, "the driver collects what `needs` names"
        if not 0 <= rank <= min(weight.shape):
            limit = min(weight.shape)
            raise UsageError(f"Rank {rank} came for a {tuple(weight.shape)} matrix; choose 0 to {limit}.")
        problem = _Problem(weight.double(), moments, heldout, quantizer)
        best = problem.start()
        if rank == 0:
            return best.split
        modes = {"auto": (False, True), "on": (True,), "off": (False,)}[self.downdate]
        start = best
        for downdate in modes:
            current = start
            for _ in range(max(self.iterations, 1)):
                low = self._low_rank(problem, current.backbone, rank)
                half = problem.iterate(current.parts, current.backbone, low)
                best = min(best, half, key=lambda iterate: iterate.error)
                current = problem.round(low, downdate)
                best = min(best, current, key=lambda iterate: iterate.error)
            low = self._low_rank(problem, current.backbone, rank)  # the best L R for the last Q
            best = min(best, problem.iterate(current.parts, current.backbone, low), key=lambda iterate: iterate.error)
        return best.split

    def _low_rank(self, problem: _Problem, backbone: Tensor, rank: int) -> Factors:
        residual = problem.weight - backbone
        left, right = _optimal(residual, problem.gram, rank)
        form = self.factor_format
        if form is None:
            return Factors(left, right)
        best: tuple[float, Factors] | None = None
        for _ in range(max(self.inner_iterations, 1)):
            gram_right = problem.gram @ right.T
            left = torch.linalg.lstsq(right @ gram_right, (residual @ gram_right).T).solution.T
            left_parts, left = _rounded(form, left)
            right = torch.linalg.lstsq(left, residual).solution
            right_parts, right = _rounded(form, right)
            error = problem.error_of(residual - left @ right)
            if best is None or error < best[0]:
                best = (error, Factors(left, right, left_parts=left_parts, right_parts=right_parts))
        assert best is not None
        return best[1]


def _optimal(residual: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L and R, balanced, of the best rank-r approximation of the residual's outputs."""
    rotation, core = smaller_side(residual)
    _, axes = principal_axes(core @ gram @ core.T)
    basis = axes[:, :rank] if rotation is None else rotation @ axes[:, :rank]
    right = basis.T @ residual
    scale = right.norm(dim=1).clamp_min(1e-300).sqrt()
    return basis * scale, right / scale[:, None]


def _rounded(form: Any, factor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts = form.quantize(factor)
    return parts, form.dequantize(parts, (factor.shape[0], factor.shape[1]), torch.float64)


@dataclass(frozen=True)
class _Iterate:
    error: float
    parts: dict[str, Tensor]
    backbone: Tensor  # (out, in) float64
    split: Split


class _Problem:
    """One layer: its weight, its Gram matrix in both coordinate systems, and the choices made on the first Q."""

    def __init__(self, weight: Tensor, moments: Moments, heldout: InputStatistics | None, quantizer: Any):
        self.weight, self.gram, self.heldout, self.quantizer = weight, moments.gram, heldout, quantizer
        self.shape = (weight.shape[0], weight.shape[1])
        self.rotated = hasattr(quantizer, "rotated")
        self.inner = quantizer.inner if self.rotated else quantizer
        self.block = self.inner.rounder(weight[:1].float()).block
        self.damping, self.stretch = DAMPINGS[0], 1.0
        self.energy = float((weight @ self.gram * weight).sum())

    def error_of(self, residual: Tensor) -> float:
        return float((residual @ self.gram * residual).sum()) / max(self.energy, 1e-300)

    def _feedback(self, gram: Tensor, damping: float) -> Feedback:
        return Feedback.of(self.quantizer.rotated_gram(gram) if self.rotated else gram, damping, self.block)

    def _round(self, target: Tensor, feedback: Feedback, stretch: float) -> tuple[dict[str, Tensor], Tensor]:
        """(parts, Q float64) of `target`, decoded from what is stored."""
        values = self.quantizer.rotated(target.float()) if self.rotated else target.float()
        rounder = self.inner.rounder(values, stretch)
        ldlq(values, feedback, rounder)
        parts = rounder.parts()
        if self.rotated:
            parts = self.quantizer.with_signs(parts, self.shape)
        return parts, self.quantizer.dequantize(parts, self.shape, torch.float64)

    def start(self) -> _Iterate:
        """LDLQ alone, after choosing damping and stretch."""

        def attempt(damping: float) -> tuple[float, tuple[Feedback, dict[str, Tensor], Tensor]]:
            feedback = self._feedback(self.gram, damping)
            parts, backbone = self._round(self.weight, feedback, 1.0)
            residual = self.weight - backbone
            judged = self.error_of(residual) if self.heldout is None else float(self.heldout.energies(residual).sum())
            return judged, (feedback, parts, backbone)

        self.damping, (feedback, parts, backbone) = choose(DAMPINGS, attempt)
        best = self.iterate(parts, backbone, None)
        for stretch in STRETCHES:
            if stretch != 1.0:
                other = self.iterate(*self._round(self.weight, feedback, stretch), None)
                if other.error < best.error:
                    best, self.stretch = other, stretch
        return best

    def round(self, low: Factors, downdate: bool) -> _Iterate:
        """The Q step for given factors."""
        feedback = None
        if downdate:
            reach = low.right @ self.gram
            rest = self.gram - reach.T @ torch.linalg.lstsq(reach @ low.right.T, reach).solution
            for damping in (self.damping, *(d for d in DAMPINGS if d > self.damping)):
                try:
                    feedback = self._feedback((rest + rest.T) / 2, damping)
                    break
                except torch.linalg.LinAlgError:  # L R carries all of H, and what is left is rounding
                    continue
        feedback = feedback or self._feedback(self.gram, self.damping)
        parts, backbone = self._round(self.weight - low.left @ low.right, feedback, self.stretch)
        return self.iterate(parts, backbone, low)

    def iterate(self, parts: dict[str, Tensor], backbone: Tensor, low: Factors | None) -> _Iterate:
        if low is None:
            empty = Factors(self.weight[:, :0], self.weight[:0])
            return _Iterate(self.error_of(self.weight - backbone), parts, backbone, Split(empty, parts, backbone))
        residual = self.weight - backbone - low.left @ low.right
        return _Iterate(self.error_of(residual), parts, backbone, Split(low, parts, backbone))
