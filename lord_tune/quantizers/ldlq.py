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

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Quantizer, Rounder

DAMPINGS: tuple[float, ...] = (0.01, 0.1, 0.3)
STRETCHES = (0.92, 1.0, 1.08)
SAMPLED_ROWS = 128  # by which the damping is judged
_LEAF = 16  # columns that are rounded one by one before their corrections are one product
_ROW_STEP = 64  # rows that start on a whole byte in any format
STACKED = 2**24  # weights rounded side by side: the memory of wide layers


@dataclass(frozen=True)
class Feedback:
    """H = L D L^T in blocks of columns, ready for any number of matrices with these inputs."""

    lower: Tensor  # (in, in) float32, unit block lower triangular
    corners: Tensor  # (blocks, block, block) float64: the diagonal blocks of D; the last may be padded with zeros
    block: int
    ridge: float  # what the damping added to the diagonal of H

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
            return cls(root.float(), (diagonal * diagonal * scale).view(-1, 1, 1), block, damping * scale)
        starts = range(0, width, block)
        corners = gram.new_zeros(len(starts), block, block)
        for index, start in enumerate(starts):  # in place: a Gram matrix of a wide layer is gigabytes
            stop = min(start + block, width)
            corner = root[start:stop, start:stop].clone()
            corners[index, : stop - start, : stop - start] = corner @ corner.T * scale
            below = root[start:, start:stop]
            below.copy_(torch.linalg.solve_triangular(corner, below, upper=False, left=False))
        return cls(root.float(), corners, block, damping * scale)

    @property
    def diagonal(self) -> Tensor:
        """D as a matrix. (in, in) float64"""
        width = len(self.lower)
        padded: Tensor = torch.block_diag(*self.corners)
        return padded[:width, :width]

    def energies(self, rounded: Rounded) -> Tensor:
        """diag(E H E^T) of what this feedback rounded, without a product with H. (out,) float32"""
        off, corners = rounded.off, self.corners.float()
        if self.block == 1:
            damped = (off * off) @ corners.view(-1)
        else:
            padded = torch.nn.functional.pad(off, (0, len(corners) * self.block - off.shape[1]))
            blocks = padded.view(len(off), -1, self.block)
            damped = ((blocks.transpose(0, 1) @ corners).transpose(0, 1) * blocks).sum((1, 2))
        return (damped - self.ridge * rounded.error.square().sum(1)).clamp_min(0)

    def importance(self) -> Tensor:
        """What a rounding error in each input costs: the diagonal of D. (in,) float32"""
        return self.corners.diagonal(dim1=1, dim2=2).reshape(-1)[: len(self.lower)].float()


@dataclass(frozen=True)
class Rounded:
    """What rounding changed."""

    error: Tensor  # (out, in) float32: W - Q
    off: Tensor  # (out, in) float32: what each weight was off when it was rounded, eta

    def shares(self, count: int) -> list[Rounded]:
        """By equal shares of the rows."""
        pairs = zip(self.error.chunk(count), self.off.chunk(count), strict=True)
        return [Rounded(error, off) for error, off in pairs]


def ldlq(weight: Tensor, feedback: Feedback | Sequence[Feedback], rounder: Rounder) -> Rounded:
    """Round `weight` (out, in) with feedback. The codes are in the rounder. Of several feedbacks, each is that of an
    equal share of the rows."""
    feedbacks = [feedback] if isinstance(feedback, Feedback) else list(feedback)
    values = weight.float().T.contiguous()  # (in, out)
    sheet = _Sheet(values, values.clone(), torch.empty_like(values), feedbacks, rounder)
    sheet.round(0, len(values))
    return Rounded(sheet.error.T, sheet.corrected.sub_(values).add_(sheet.error).T)


@dataclass(frozen=True)
class _Sheet:
    """A matrix in the making, transposed. No closure of `ldlq` that calls itself: such a circle of references keeps
    all of these, and the rounder, until Python looks for circles (1 GB for the embedding of SmolLM2-135M)."""

    values: Tensor  # (in, out) float32: W
    corrected: Tensor  # (in, out): with the corrections from the right so far; in place
    error: Tensor  # (in, out): W - Q, result
    feedbacks: list[Feedback]
    rounder: Rounder

    def round(self, start: int, stop: int) -> None:
        """Columns start..stop, whose corrections from the right are in."""
        count, block = len(self.feedbacks), self.feedbacks[0].block
        part = slice(start, stop)
        if block == 1 and stop - start <= _LEAF:
            given = self.values[part], self.corrected[part], self.error[part]
            _round_columns(start, *given, self.feedbacks, self.rounder)
        elif stop - start <= block:
            torch.sub(self.values[part], self.rounder.round(self.corrected[part], start), out=self.error[part])
        else:
            middle = start + -(-(stop - start) // (2 * block)) * block
            self.round(middle, stop)
            shares = zip(self.feedbacks, self.corrected.chunk(count, 1), self.error.chunk(count, 1), strict=True)
            for own, target, known in shares:
                target[start:middle].addmm_(own.lower[middle:stop, start:middle].T, known[middle:stop])
            self.round(start, middle)


def _round_columns(
    start: int,
    values: Tensor,  # (n, out): columns start..start + n
    corrected: Tensor,  # the same with all corrections from the right; in place
    error: Tensor,  # result
    feedbacks: list[Feedback],
    rounder: Rounder,
) -> None:
    """`ldlq` of a few columns, one by one: what an operation costs to start decides, so there are few of them."""
    n = len(values)
    lower = [own.lower[start : start + n, start : start + n].tril(-1).unbind(0) for own in feedbacks]
    targets = corrected.chunk(len(feedbacks), 1)
    known = [share.unbind(0) for share in error.chunk(len(feedbacks), 1)]
    lines = [tensor.split(1) for tensor in (values, corrected, error)]
    for k in range(n - 1, -1, -1):
        value, target, left = (line[k] for line in lines)
        torch.sub(value, rounder.round(target, start + k), out=left)
        if k:
            for share, own, errors in zip(targets, lower, known, strict=True):
                share.addr_(own[k], errors[k])


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
    shared: Tensor | None = None,  # the inputs' own Gram matrix, where others with it will be rounded too
) -> Fitted:
    """Rounds with the damping that errs least on held-out text (without it, on H), judged by a sample of the rows,
    because feedback fits to noise; and each row with the stretch of its scales that errs least on H. The factors of a
    shared Gram matrix are kept while it lives, or until another one is shared.

    Candidates are rounded side by side, since most of the time of a column is not its arithmetic. Raises
    torch.linalg.LinAlgError if no damping makes H positive definite.
    """
    values = quantizer.turned(weight.float())
    damping, feedback = _damped(quantizer, values, _feedbacks(quantizer, gram, dampings, shared), energies)
    if quantizer.rows_apart((weight.shape[0], weight.shape[1])):
        rows = _ROW_STEP * max(1, STACKED // (len(stretches) * weight.shape[1] * _ROW_STEP))
        found = [_apart(quantizer, some, feedback, stretches) for some in values.split(rows)]
        parts = {name: torch.cat([own[name] for own, _ in found]) for name in found[0][0]}
        stretch = torch.cat([own for _, own in found])
    else:
        parts, stretch = _joined(quantizer, values, feedback, stretches)
    return Fitted(*_stored(quantizer, parts, weight), feedback, damping, stretch)


def _apart(
    quantizer: Quantizer, values: Tensor, feedback: Feedback, stretches: tuple[float, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, stretch of each row) of rows that do not depend on each other."""
    rows = values.repeat(len(stretches), 1)
    tried = torch.tensor(stretches, device=rows.device)
    rounder = quantizer.rounder(rows, tried.repeat_interleave(len(values))[:, None], feedback.importance())
    errors = feedback.energies(ldlq(rows, feedback, rounder)).view(len(stretches), -1)
    which = errors.argmin(0)
    return rounder.parts(which * len(values) + torch.arange(len(values), device=which.device)), tried[which][:, None]


def _joined(
    quantizer: Quantizer, values: Tensor, feedback: Feedback, stretches: tuple[float, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, stretch of each row) of rows that share scales or outliers: they may do worse together than each did."""
    errors, kept = [], []

    def attempt(stretch: float | Tensor) -> None:
        rounder = quantizer.rounder(values, stretch, feedback.importance())
        errors.append(feedback.energies(ldlq(values, feedback, rounder)))
        kept.append(rounder)

    for stretch in stretches:
        attempt(stretch)
    tried = torch.tensor(stretches, device=values.device)
    mixed = tried[torch.stack(errors).argmin(0)][:, None]
    attempt(mixed)
    least = int(torch.stack(errors).sum(1).argmin())
    return kept[least].parts(), mixed if least == len(stretches) else torch.full_like(mixed, stretches[least])


def _damped(
    quantizer: Quantizer,
    values: Tensor,  # (out, in), turned
    found: list[tuple[float, Feedback]],
    energies: Callable[[Tensor], Tensor] | None,
) -> tuple[float, Feedback]:
    """(damping, feedback) with the least error on a sample of the rows."""
    if len(found) == 1:
        return found[0]
    sample = values[:: max(1, len(values) // SAMPLED_ROWS)].repeat(len(found), 1)
    feedbacks = [feedback for _, feedback in found]
    rounded = ldlq(sample, feedbacks, quantizer.rounder(sample, 1.0, feedbacks[0].importance()))
    if energies is not None:
        judged = energies(rounded.error).view(len(found), -1)
    else:
        judged = torch.stack([own.energies(r) for own, r in zip(feedbacks, rounded.shares(len(found)), strict=True)])
    return found[int(judged.sum(1).argmin())]


def _feedbacks(
    quantizer: Quantizer,
    gram: Tensor,  # (in, in), turned
    dampings: tuple[float, ...],
    shared: Tensor | None,
) -> list[tuple[float, Feedback]]:
    """Those of the dampings that make H positive definite."""
    kept = {} if shared is None else _kept.of(shared)
    found: list[tuple[float, Feedback]] = []
    for damping in dampings:
        try:
            if (quantizer, damping) not in kept:
                kept[quantizer, damping] = Feedback.of(gram, damping, quantizer.block)
            found.append((damping, kept[quantizer, damping]))
        except torch.linalg.LinAlgError:
            continue
    if not found:
        raise torch.linalg.LinAlgError("no damping makes the Gram matrix positive definite")
    return found


class _Kept:
    """The feedbacks of one Gram matrix by format and damping, while it lives and is not written to."""

    def __init__(self) -> None:
        self._gram: weakref.ref[Tensor] | None = None
        self._version = 0
        self._feedbacks: dict[tuple[Quantizer, float], Feedback] = {}

    def of(self, gram: Tensor) -> dict[tuple[Quantizer, float], Feedback]:
        if self._gram is None or self._gram() is not gram or self._version != gram._version:
            self._gram, self._version, self._feedbacks = weakref.ref(gram, self._forget), gram._version, {}
        return self._feedbacks

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._gram is reference:
            self._gram, self._feedbacks = None, {}


_kept = _Kept()
