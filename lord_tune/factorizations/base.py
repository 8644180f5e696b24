"""The contract of a factorization, and the truncation that svd, whitened and afm share.

A factorization is a frozen dataclass of its hyperparameters and sees tensors, never a model. It declares the statistics
it `needs` ("input_gram": the moments of the layer's input); the driver collects only those. `split` returns W ~ Q + L R
(Q absent without a quantizer). Methods whose truncations are nested also give their `spectrum`, from which every rank
is a slice: rank allocation is built on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..errors import UsageError
from ..linalg import balanced, row_energies
from ..quantizers import Quantizer


@dataclass(frozen=True)
class Spectrum:
    """An orthonormal basis of a layer's outputs, most important direction first."""

    basis: Tensor  # (out, k)
    energies: Tensor  # (k,) float64: the squared error of rank r is the sum over j >= r
    centre: Tensor | None = None  # (in,): inputs are taken relative to it, its output goes to the bias


@dataclass(frozen=True)
class Factors:
    """L and R, and what has to be added to the layer's bias (afm only)."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)
    bias_shift: Tensor | None = None  # (out,)


@dataclass(frozen=True)
class Split:
    """W ~ Q + L R."""

    factors: Factors
    parts: dict[str, Tensor] | None = None  # the stored parts of Q
    backbone: Tensor | None = None  # Q, (out, in) float64
    centre: Tensor | None = None  # (in,), see Spectrum


class Factorization(Protocol):
    """One layer in, its factors out."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def split(
        self,
        weight: Tensor,  # (out, in)
        moments: Moments | None,
        rank: int,
        quantizer: Quantizer | None,
    ) -> Split: ...


def truncate(
    weight: Tensor,  # (out, in)
    spectrum: Spectrum,
    rank: int,
) -> Factors:
    """L = U_r, R = U_r^T W; with a centre mu also the bias shift (I - U_r U_r^T) W mu. float64."""
    limit = spectrum.basis.shape[1]
    if not 0 <= rank <= limit:
        raise UsageError(f"Rank {rank} came for a {tuple(weight.shape)} matrix; choose 0 to {limit}.")
    w, left = weight.double(), spectrum.basis[:, :rank].double()
    right = left.T @ w
    if spectrum.centre is None:
        return Factors(left, right)
    output_mean = w @ spectrum.centre.double()
    return Factors(left, right, output_mean - left @ (left.T @ output_mean))


def balance(factors: Factors) -> Factors:
    """The same factors scaled for training (equal gradient scale); without it L has orthonormal columns."""
    left, right = balanced(factors.left, factors.right)
    return Factors(left, right, factors.bias_shift)


class Projection:
    """Base of the methods whose optimum is an orthogonal projection of the outputs, W' = U_r U_r^T W."""

    def spectrum(self, weight: Tensor, moments: Moments | None) -> Spectrum:
        raise TypeError(f"{type(self).__name__} has to define spectrum")

    def split(self, weight: Tensor, moments: Moments | None, rank: int, quantizer: Quantizer | None) -> Split:
        """Quantize W first if asked to, then factor the residual W - Q."""
        w = weight.double()
        parts, backbone = None, None
        if quantizer is not None:
            parts = quantizer.quantize(weight)
            backbone = quantizer.dequantize(parts, (weight.shape[0], weight.shape[1]), w.dtype)
            w = w - backbone
        if rank == 0:  # Q alone
            return Split(Factors(w[:, :0], w[:0]), parts, backbone)
        spectrum = self.spectrum(w, moments)
        return Split(truncate(w, spectrum, rank), parts, backbone, spectrum.centre)


def error_curves(
    weight: Tensor,  # (out, in)
    spectrum: Spectrum,
    calibration: Moments,
    heldout: Moments | None = None,
) -> dict[str, Tensor]:
    """Relative output errors sqrt(E||y - y'||^2 / E||W x||^2) at the ranks 0..k, (k + 1,) each: `calibrated`, `heldout`
    (the same basis on other text) and `plain` (truncated SVD of W on the calibration text, float32 basis).

    The basis is complete for the range of W (k = min(out, in)), so what is lost at rank r is the energy of the
    directions from r on.
    """
    w, basis = weight.double(), spectrum.basis.double()
    by_outputs = w.shape[0] <= w.shape[1]
    rows = None if by_outputs and spectrum.centre is None else basis.T @ w
    curves = {}
    for name, moments in {"calibrated": calibration, "heldout": heldout}.items():
        if moments is None:
            continue
        outputs = w @ moments.gram @ w.T if by_outputs else None  # W H W^T, the smaller side
        if rows is not None:
            energies = row_energies(rows, moments.shifted(spectrum.centre))
        else:
            assert outputs is not None
            energies = ((basis.T @ outputs) * basis.T).sum(1)
        reference = energies.sum()
        if rows is not None and spectrum.centre is not None:
            reference = row_energies(rows, moments.gram).sum()
        curves[name] = _tail_curve(energies, reference)
        if name == "calibrated":
            curves["plain"] = _tail_curve(_plain_energies(weight, moments, outputs), reference)
    return curves


def _tail_curve(energies: Tensor, reference: Tensor) -> Tensor:
    """sqrt(sum over j >= r of energies / reference) for r = 0..k. (k + 1,)"""
    tails = torch.cat([energies.clamp_min(0).flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return (tails / reference.clamp_min(1e-300)).sqrt()


def _plain_energies(weight: Tensor, moments: Moments, outputs: Tensor | None) -> Tensor:
    """Output energy along the left singular vectors u_j of W, from its smaller Gram matrix: u_j^T (W H W^T) u_j, or
    sigma_j^2 v_j^T H v_j with the right singular vectors where out > in. (k,)"""
    w = weight.float()
    if outputs is not None:
        vectors = torch.linalg.eigh(w @ w.T).eigenvectors.flip(1).double()
        return ((vectors.T @ outputs) * vectors.T).sum(1)
    squares, vectors = torch.linalg.eigh(w.T @ w)
    rows = vectors.flip(1).T.double()
    return squares.flip(0).clamp_min(0).double() * row_energies(rows, moments.gram)


def relative_error(
    residual: Tensor,  # (out, in): W - Q - L R
    weight: Tensor,  # (out, in)
    moments: Moments,
    centre: Tensor | None = None,
) -> float:
    """sqrt(E||residual (x - centre)||^2 / E||W x||^2)."""
    error = row_energies(residual.double(), moments.shifted(centre)).sum()
    reference = row_energies(weight.double(), moments.gram).sum().clamp_min(1e-300)
    return float((error.clamp_min(0) / reference).sqrt())
