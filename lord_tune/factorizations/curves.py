"""The errors of a layer's outputs: at every rank of a solution, and of any approximation of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from .base import Solution
from .tails import along, corner_curve, tail_curve


def error_curves(solution: Solution, calibration: Moments, heldout: InputStatistics | None = None) -> dict[str, Tensor]:
    """Relative output errors sqrt(E||y - y'||^2 / E||W x||^2) at the ranks 0..k, (k + 1,) each: `calibrated`, `heldout`
    (the same basis on other text), `plain` (truncated SVD of W on the calibration text, float32 basis) and
    `beyond_top`, the calibrated error relative to what is left of the outputs without their largest direction: one
    massive activation can hold most of the energy and make any error look small.

    The basis is complete for the range of W (k = min(out, in)), so what is lost at rank r is the energy of the
    directions from r on; those of an oblique projection are not orthogonal, and their products count as well.
    """
    core = solution.core
    assert core.outputs is not None, "the driver gives the moments to both"
    reference = core.outputs.diagonal().sum()
    measure = _orthogonal_curves if solution.dual_axes is None else _oblique_curves
    curves = measure(solution, calibration, heldout, reference)
    # the same order of work in float32 is enough for a baseline
    matrix = core.matrix.float()
    plain = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1).double()
    curves["plain"] = tail_curve(along(plain, core.outputs), reference)
    return curves


def _orthogonal_curves(
    solution: Solution, calibration: Moments, heldout: InputStatistics | None, reference: Tensor
) -> dict[str, Tensor]:
    core, axes, centre = solution.core, solution.axes, solution.spectrum.centre
    energies = along(axes, core.shifted_outputs(centre, calibration.mean))
    curves = {"calibrated": tail_curve(energies, reference)}
    curves["beyond_top"] = tail_curve(energies, reference - energies.max()).clamp_max(1.0)
    if heldout is not None:
        rows = axes.T @ core.matrix
        other = heldout.energies(rows, centre)
        curves["heldout"] = tail_curve(other, other.sum() if centre is None else heldout.energies(rows).sum())
    return curves


def _oblique_curves(
    solution: Solution, calibration: Moments, heldout: InputStatistics | None, reference: Tensor
) -> dict[str, Tensor]:
    core, axes, dual = solution.core, solution.axes, solution.dual_axes
    assert dual is not None and core.outputs is not None and solution.spectrum.centre is None
    products = axes.T @ axes
    lost = products * (dual.T @ core.outputs @ dual)
    rest = reference - torch.linalg.eigvalsh(core.outputs)[-1]
    curves = {"calibrated": corner_curve(lost, reference), "beyond_top": corner_curve(lost, rest).clamp_max(1.0)}
    if heldout is not None:
        other = products * heldout.moment(dual.T @ core.matrix)
        curves["heldout"] = corner_curve(other, heldout.energies(core.matrix).sum())
    return curves


def relative_error(
    residual: Tensor,  # (out, in): W - Q - L R
    weight: Tensor,  # (out, in)
    moments: InputStatistics,
    centre: Tensor | None = None,
) -> float:
    """sqrt(E||residual (x - centre)||^2 / E||W x||^2)."""
    error = moments.energies(residual, centre).sum()
    reference = moments.energies(weight).sum().clamp_min(1e-300)
    return float((error.clamp_min(0) / reference).sqrt())


class OutputErrors:
    """Relative errors sqrt(E||(W - Q - L R)(x - centre)||^2 / E||W x||^2) for any L and R beside one Q. The product of
    W - Q with H, which takes out in^2, is made once."""

    def __init__(
        self,
        residual: Tensor,  # (out, in) float64: W - Q
        moments: Moments,
        reference: Tensor,  # E||W x||^2
    ):
        self._residual, self._moments, self._reference = residual, moments, reference.clamp_min(1e-300)
        self._product = residual @ moments.gram

    def __call__(
        self,
        left: Tensor,  # (out, rank) float64
        right: Tensor,  # (rank, in)
        centre: Tensor | None = None,  # (in,)
    ) -> float:
        moments = self._moments
        energy = (self._product * self._residual).sum()
        energy = energy - 2 * (left * (self._product @ right.T)).sum()
        energy = energy + ((left.T @ left) * (right @ moments.gram @ right.T)).sum()
        if centre is not None:
            shift, mean = (self._residual @ x - left @ (right @ x) for x in (centre.double(), moments.mean))
            energy = energy + (shift * (shift - 2 * mean)).sum()
        return float((energy.clamp_min(0) / self._reference).sqrt())
