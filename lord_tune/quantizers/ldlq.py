"""Rounding with error feedback: LDLQ (QuIP, arXiv 2307.13304, section 3.2; block form in QuIP#), the same as GPTQ.

H = L D L^T with unit (block) lower triangular L. From the last block of columns to the first,

    Q_k = round(W_k + (W - Q)_(>k) L_(>k, k))

and the error is sum over k of tr(eta_k D_k eta_k^T) with eta_k the rounding error of block k alone: tr D instead of
tr H. H is damped, H + sigma mean(diag H) I: with few tokens the small eigenvalues are noise and feedback fits to them.
`fitted` chooses sigma by held-out error.

A format takes part through a `Rounder`: it fixes its scales for the whole matrix first, then rounds blocks of columns.
A rotated format (incoherence.py) is rounded in its own coordinates, with the Gram matrix of the rotated inputs.

Everything lies transposed in memory, one input after the other, so that a column of W is contiguous. The corrections
are passed on by halves: once the right half of a range of columns is rounded, one product corrects the left half. That
is as much arithmetic as column by column, in products as large as they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import row_energies
from .base import Quantizer, Rounder

DAMPINGS: tuple[float, ...] = (0.01, 0.1, 0.3)
STRETCHES = (0.92, 1.0, 1.08)
SAMPLED_ROWS = 128  # by which the damping is judged


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


def ldlq(weight: Tensor, feedback: Feedback | Sequence[Feedback], rounder: Rounder) -> Tensor:
    """Round `weight` (out, in) with feedback; returns W - Q (out, in) float32. The codes are in the rounder. Of several
    feedbacks, each is that of an equal share of the rows."""
    feedbacks = [feedback] if isinstance(feedback, Feedback) else list(feedback)
    values = weight.float().T.contiguous()  # (in, out)
    corrected, error = values.clone(), torch.empty_like(values)
    block = feedbacks[0].block
    shares = list(zip(feedbacks, corrected.chunk(len(feedbacks), 1), error.chunk(len(feedbacks), 1), strict=True))

    def round_range(start: int, stop: int) -> None:
        if stop - start <= block:
            torch.sub(values[start:stop], rounder.round(corrected[start:stop], start), out=error[start:stop])
            return
        middle = start + -(-(stop - start) // (2 * block)) * block
        round_range(middle, stop)
        for own, target, known in shares:
            target[start:middle].addmm_(own.lower[middle:stop, start:middle].T, known[middle:stop])
        round_range(start, middle)

    round_range(0, len(values))
    return error.T


def round_with_feedback(
    quantizer: Quantizer,
    weight: Tensor,  # (out, in)
    feedback: Feedback,  # of the turned Gram matrix
    stretch: Tensor | float = 1.0,  # of the scales; (out, 1) or one for all
) -> tuple[dict[str, Tensor], Tensor]:
    """(stored parts, Q float64 as a reload decodes it)."""
    values = quantizer.turned(weight.float())
    rounder = quantizer.rounder(values, stretch, feedback.importance())
    ldlq(values, feedback, rounder)
    return _stored(quantizer, rounder.parts(), weight)


def _stored(quantizer: Quantizer, parts: dict[str, Tensor], weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    shape = (weight.shape[0], weight.shape[1])
    completed = quantizer.completed(parts, shape)
    return completed, quantizer.dequantize(completed, shape, torch.float64)


@dataclass(frozen=True)
class Fitted:
    """One matrix rounded with feedback, and the choices made for it."""

    parts: dict[str, Tensor]
    backbone: Tensor  # Q, (out, in) float64
    feedback: Feedback
    damping: float
    stretch: Tensor  # (out, 1) float32


def fitted(
    quantizer: Quantizer,
    weight: Tensor,  # (out, in)
    gram: Tensor,  # (in, in) float64, of the turned inputs
    energies: Callable[[Tensor], Tensor] | None = None,  # of held-out text: squared errors of rows (k, in), turned
    dampings: tuple[float, ...] = DAMPINGS,
    stretches: tuple[float, ...] = STRETCHES,
) -> Fitted:
    """Rounds with the damping that errs least on held-out text (without it, on H), judged by a sample of the rows,
    because feedback fits to noise; and each row with the stretch of its scales that errs least on H.

    Candidates are rounded side by side, since most of the time of a column is not its arithmetic. Raises
    torch.linalg.LinAlgError if no damping makes H positive definite.
    """
    values = quantizer.turned(weight.float())
    damping, feedback = _damped(quantizer, values, gram, energies, dampings)
    apart = quantizer.rows_apart((weight.shape[0], weight.shape[1]))
    tried, errors = [], []
    for some in [stretches] if apart else [(stretch,) for stretch in stretches]:
        rows = values.repeat(len(some), 1)
        stretch = torch.tensor(some, device=rows.device).repeat_interleave(len(values))[:, None]
        tried.append(quantizer.rounder(rows, stretch, feedback.importance()))
        errors.append(row_energies(ldlq(rows, feedback, tried[-1]).double(), gram).view(len(some), -1))
    which = torch.cat(errors).argmin(0)
    stretch = torch.tensor(stretches, device=which.device)[which][:, None]
    if apart:
        parts = tried[0].parts(which * len(values) + torch.arange(len(values), device=which.device))
    else:  # rows that share scales or outliers may do worse together than each did
        mixed = quantizer.rounder(values, stretch, feedback.importance())
        errors.append(row_energies(ldlq(values, feedback, mixed).double(), gram)[None])
        least = int(torch.cat(errors).sum(1).argmin())
        parts = [*tried, mixed][least].parts()
        if least < len(stretches):
            stretch = torch.full_like(stretch, stretches[least])
    return Fitted(*_stored(quantizer, parts, weight), feedback, damping, stretch)


def _damped(
    quantizer: Quantizer,
    values: Tensor,  # (out, in), turned
    gram: Tensor,
    energies: Callable[[Tensor], Tensor] | None,
    dampings: tuple[float, ...],
) -> tuple[float, Feedback]:
    """(damping, feedback) with the least error on a sample of the rows."""
    found: list[tuple[float, Feedback]] = []
    for damping in dampings:
        try:
            found.append((damping, Feedback.of(gram, damping, quantizer.block)))
        except torch.linalg.LinAlgError:
            continue
    if not found:
        raise torch.linalg.LinAlgError("no damping makes the Gram matrix positive definite")
    if len(found) == 1:
        return found[0]
    sample = values[:: max(1, len(values) // SAMPLED_ROWS)].repeat(len(found), 1)
    feedbacks = [feedback for _, feedback in found]
    error = ldlq(sample, feedbacks, quantizer.rounder(sample, 1.0, feedbacks[0].importance()))
    judged = row_energies(error.double(), gram) if energies is None else energies(error)
    return found[int(judged.view(len(found), -1).sum(1).argmin())]
