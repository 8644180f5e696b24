"""Rounding with error feedback: LDLQ (QuIP, arXiv 2307.13304, section 3.2; block form in QuIP#), the same as GPTQ.

H = L D L^T with unit (block) lower triangular L. From the last block of columns to the first,

    Q_k = round(W_k + (W - Q)_(>k) L_(>k, k))

and the error is sum over k of tr(eta_k D_k eta_k^T) with eta_k the rounding error of block k alone: tr D instead of
tr H. H is damped, H + sigma mean(diag H) I: with few tokens the small eigenvalues are noise and feedback fits to them.
CALDERA chooses sigma by held-out error (`choose`).

A format takes part through a `Rounder`: it fixes its scales for the whole matrix first, then rounds blocks of columns.
A rotated format (incoherence.py) is rounded in its own coordinates, with the Gram matrix of the rotated inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .base import Quantizer, Rounder

Result = TypeVar("Result")
_PANEL = 128  # columns whose corrections from the right are one product


@dataclass(frozen=True)
class Feedback:
    """H = L D L^T in blocks of columns, ready for any number of matrices with these inputs."""

    lower: Tensor  # (in, in) float32, unit block lower triangular
    corners: Tensor  # (blocks, block, block) float64: the diagonal blocks of D; the last may be padded with zeros
    block: int

    @classmethod
    def of(
        cls,
        gram: Tensor,  # (in, in) float64
        damping: float,
        block: int,
    ) -> Feedback:
        """Raises torch.linalg.LinAlgError if H plus damping is not positive definite."""
        width = len(gram)
        mean = float(gram.diagonal().mean())
        scale = mean if mean > 0 else 1.0
        damped = gram / scale
        damped.diagonal().add_(damping)
        root = torch.linalg.cholesky(damped)
        del damped
        if block == 1:
            diagonal = root.diagonal().clone()
            root *= 1 / diagonal
            return cls(root.float(), (diagonal * diagonal * scale).view(-1, 1, 1), block)
        starts = range(0, width, block)
        corners = gram.new_zeros(len(starts), block, block)
        for index, start in enumerate(starts):  # in place: a Gram matrix of a wide layer is gigabytes
            stop = min(start + block, width)
            corner = root[start:stop, start:stop].clone()
            corners[index, : stop - start, : stop - start] = corner @ corner.T * scale
            below = root[start:, start:stop]
            below.copy_(torch.linalg.solve_triangular(corner, below, upper=False, left=False))
        return cls(root.float(), corners, block)

    @property
    def diagonal(self) -> Tensor:
        """D as a matrix. (in, in) float64"""
        width = len(self.lower)
        padded: Tensor = torch.block_diag(*self.corners)
        return padded[:width, :width]

    def importance(self) -> Tensor:
        """What a rounding error in each input costs: the diagonal of D. (in,) float32"""
        return self.corners.diagonal(dim1=1, dim2=2).reshape(-1)[: len(self.lower)].float()


def ldlq(weight: Tensor, feedback: Feedback, rounder: Rounder) -> Tensor:
    """Round `weight` (out, in) with feedback; returns Q (out, in) float32. The codes are in the rounder."""
    values = weight.float().contiguous()
    width, block = values.shape[1], feedback.block
    error = torch.zeros_like(values)
    decoded = torch.empty_like(values)
    starts = list(range(0, width, block))
    per_panel = max(1, _PANEL // block)
    for first in range((len(starts) - 1) // per_panel * per_panel, -1, -per_panel):
        panel = starts[first : first + per_panel]
        left, right = panel[0], min(panel[-1] + block, width)
        corrected = values[:, left:right] + error[:, right:] @ feedback.lower[right:, left:right]
        for start in reversed(panel):
            stop = min(start + block, width)
            target = corrected[:, start - left : stop - left]
            target = target + error[:, stop:right] @ feedback.lower[stop:right, start:stop]
            decoded[:, start:stop] = rounder.round(target, start)
            torch.sub(values[:, start:stop], decoded[:, start:stop], out=error[:, start:stop])
    return decoded


def round_with_feedback(
    quantizer: Quantizer,
    weight: Tensor,  # (out, in)
    feedback: Feedback,  # of the turned Gram matrix
    stretch: Tensor | float = 1.0,  # of the scales; (out, 1) or one for all
) -> tuple[dict[str, Tensor], Tensor]:
    """(stored parts, Q float64 as a reload decodes it)."""
    shape = (weight.shape[0], weight.shape[1])
    values = quantizer.turned(weight.float())
    rounder = quantizer.rounder(values, stretch, feedback.importance())
    ldlq(values, feedback, rounder)
    parts = quantizer.completed(rounder.parts(), shape)
    return parts, quantizer.dequantize(parts, shape, torch.float64)


def choose(dampings: tuple[float, ...], attempt: Callable[[float], tuple[float, Result]]) -> tuple[float, Result]:
    """(damping, result) with the least error among the candidates that are positive definite; `attempt` gives (error,
    result)."""
    best: tuple[float, float, Result] | None = None
    for damping in dampings:
        try:
            error, result = attempt(damping)
        except torch.linalg.LinAlgError:
            continue
        if best is None or error < best[0]:
            best = (error, damping, result)
    if best is None:
        raise torch.linalg.LinAlgError("no damping makes the Gram matrix positive definite")
    return best[1], best[2]
