"""Second moments of the inputs of one layer, streamed window by window.

Products of a window are taken in the activations' precision (float32 or better) and summed in float64, so the memory
does not depend on the number of tokens and 10^5 windows lose no digits. Only the block upper triangle of X^T X is
multiplied: at width 1536 that is 9/16 of the work of the full product, and X^T X is half of the cost of calibration.

Text that only measures (the held-out part) is kept as the rows themselves as long as these are smaller than a Gram
matrix: 1,024 tokens of a layer with 28,672 inputs are 117 MB, its Gram matrix 6.6 GB. Both kinds of statistics answer
the same question, `energies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..linalg import row_energies
from ..parallel import Workers

_PANEL = 192  # columns of a panel of the triangular product; below 128 overhead outweighs the arithmetic saved


class InputStatistics(Protocol):
    """What is known of a layer's input x."""

    def energies(self, rows: Tensor, centre: Tensor | None = None) -> Tensor:
        """Mean of (row . (x - centre))^2 for each of `rows` (k, in); `centre` is (in,) or zero. (k,) float64"""
        ...

    def moment(self, rows: Tensor) -> Tensor:
        """Mean of (rows x) (rows x)^T for `rows` (k, in). (k, k) float64"""
        ...


@dataclass(frozen=True)
class Moments:
    """What one layer input looked like over the calibration tokens."""

    gram: Tensor  # (in, in) float64, mean of x x^T over all tokens
    mean: Tensor  # (in,) float64, mean of x
    first: Tensor  # (windows, in) float64, the inputs at position 0
    tokens: int
    sums: Tensor | None = None  # (windows, in) float64, sums of x over each window
    counts: Tensor | None = None  # (windows,) float64, tokens of each
    readers: int = 1  # layers that are given this input

    @property
    def shared_gram(self) -> Tensor | None:
        """`gram`, if other layers have the same one."""
        return self.gram if self.readers > 1 else None

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Of a layer that runs several times in a forward pass, each time on another input."""
        tokens = sum(part.tokens for part in parts)
        shares = [part.tokens / max(tokens, 1) for part in parts]
        gram = parts[0].gram * shares[0]
        for part, share in zip(parts[1:], shares[1:], strict=True):
            gram.add_(part.gram, alpha=share)
        mean = sum(
            (part.mean * share for part, share in zip(parts, shares, strict=True)), torch.zeros_like(parts[0].mean)
        )
        sums, counts = [p.sums for p in parts if p.sums is not None], [p.counts for p in parts if p.counts is not None]
        first, known = torch.cat([part.first for part in parts]), len(sums) == len(counts) == len(parts)
        return cls(gram, mean, first, tokens, torch.cat(sums) if known else None, torch.cat(counts) if known else None)

    def between(
        self,
        matrix: Tensor,  # (k, in)
        groups: int,
    ) -> Tensor:
        """matrix C matrix^T with C the covariance of the means of `groups` groups of windows, each weighted by its
        tokens. (k, k)

        The covariance of all tokens is that within groups plus that between their means. So what is left without C is
        the average of the groups' own covariances: Bolaco's pooled covariance (Ji et al., arXiv 2405.10616, section
        3.2). Of plain second moments the average over groups is that of all tokens, whatever the groups. The groups are
        runs of neighbouring windows, in the order in which they were read, as many as there are windows at most.
        """
        assert self.sums is not None and self.counts is not None, "the moments were accumulated"
        found = self.gram.new_zeros(len(matrix), len(matrix))
        parts = zip(self.sums.tensor_split(groups), self.counts.tensor_split(groups), strict=True)
        for sums, counts in parts:
            tokens = counts.sum()
            if tokens > 0:
                shift = matrix @ (sums.sum(0) / tokens - self.mean)
                found += tokens / self.tokens * torch.outer(shift, shift)
        return found

    @property
    def sink_gram(self) -> Tensor:
        """Mean of x x^T over the tokens at position 0. (in, in)"""
        return self.first.T @ self.first / max(len(self.first), 1)

    def sink_moment(
        self,
        matrix: Tensor,  # (k, in)
    ) -> Tensor:
        """matrix H_0 matrix^T with H_0 the moment of position 0, without forming H_0. (k, k)

        Attention gives its largest weights to position 0 (the sink), whose value and MLP outputs are nearly zero; it
        carries under 1e-4 of the energy, so a plain second moment lets a factorization spoil it. Adding 0.05 H_0 costs
        ordinary tokens little; a prototype took uniform ranks on SmolLM2 from perplexity 37.4 to 28.9 (dense 12.2).
        With loss_weighted ranks it makes no difference (10.77 with and without, 20 % removed).
        """
        outputs = matrix @ self.first.to(matrix).T
        return outputs @ outputs.T / max(len(self.first), 1)

    def energies(self, rows: Tensor, centre: Tensor | None = None) -> Tensor:
        rows = rows.double()
        energy = row_energies(rows, self.gram)
        if centre is None:
            return energy
        shift = rows @ centre
        return energy - 2 * shift * (rows @ self.mean) + shift * shift

    def moment(self, rows: Tensor) -> Tensor:
        rows = rows.double()
        return rows @ self.gram @ rows.T

    def describe(self) -> dict[str, float]:
        """How well the Gram matrix determines anything: tokens, inputs that never fired, the share of the energy in the
        largest channel (massive activations: above one half, an error is that of one direction)."""
        diagonal = self.gram.diagonal()
        total = float(diagonal.sum())
        return {
            "tokens": self.tokens,
            "dead_inputs": int((diagonal == 0).sum()),
            "largest_input_share": float(diagonal.max()) / total if total > 0 else 0.0,
        }


@dataclass(frozen=True)
class Sample:
    """The inputs themselves, for text that is only measured on."""

    rows: Tensor  # (token, in), float32 or float64

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        return cls(torch.cat([part.rows for part in parts]))

    def energies(self, rows: Tensor, centre: Tensor | None = None) -> Tensor:
        directions = rows.to(self.rows.dtype)
        outputs = self.rows @ directions.T
        if centre is not None:
            outputs = outputs - directions @ centre.to(directions)
        return (outputs * outputs).double().mean(0)

    def moment(self, rows: Tensor) -> Tensor:
        outputs = self.rows @ rows.to(self.rows.dtype).T
        return (outputs.T @ outputs).double() / max(len(outputs), 1)


class MomentAccumulator:
    """Sums over the windows fed to `update`; `result` gives the means over the windows of all processes."""

    def __init__(self, width: int, device: torch.device):
        self.width, self._device = width, device
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._first: list[Tensor] = []  # rows at position 0: few, so they are kept
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums: list[Tensor] = []  # of the rows of each call: their means tell groups of windows apart
        self._counts: list[int] = []
        self._tokens = 0

    def update(self, inputs: Tensor) -> None:  # (batch, position, in), or (token, in): no position 0 is known then
        rows = _rows_of(inputs)
        add_gram(self._gram, rows)
        own = rows.sum(0)
        self._sum += own
        self._sums.append(own.double())
        self._counts.append(rows.shape[0])
        self._tokens += rows.shape[0]
        if inputs.dim() == 3:
            self._first.append(inputs.detach()[:, 0].double())

    def result(self, name: str, workers: Workers | None = None) -> Moments:
        """The moments; raises CalibrationError naming the layer if an input was NaN or Inf. Call it once: the sums are
        turned into the means in place."""
        workers = workers or Workers()
        counts = torch.tensor([self._tokens], dtype=torch.float64, device=self._device)
        for total in (self._gram, self._sum, counts):
            workers.add_up(total)
        tokens = int(counts)
        mirror(self._gram).div_(max(tokens, 1))
        if not torch.isfinite(self._gram.sum()):
            raise _not_finite(name)
        own = torch.cat(self._first) if self._first else self._gram.new_zeros(0, self.width)
        sums = torch.stack(self._sums) if self._sums else self._gram.new_zeros(0, self.width)
        each = torch.tensor(self._counts, dtype=torch.float64, device=self._device)
        mean, first = self._sum / max(tokens, 1), workers.concatenate(own)
        return Moments(self._gram, mean, first, tokens, workers.concatenate(sums), workers.concatenate(each))


class SampleAccumulator:
    """Keeps the rows fed to `update`."""

    def __init__(self, width: int, device: torch.device):
        self.width, self._device = width, device
        self._rows: list[Tensor] = []

    def update(self, inputs: Tensor) -> None:  # (batch, position, in) or (token, in)
        self._rows.append(_rows_of(inputs).clone())

    def result(self, name: str, workers: Workers | None = None) -> Sample:
        """The rows of all processes; raises CalibrationError naming the layer if one was NaN or Inf."""
        own = torch.cat(self._rows) if self._rows else torch.zeros(0, self.width, device=self._device)
        rows = (workers or Workers()).concatenate(own)
        if not torch.isfinite(rows.sum()):
            raise _not_finite(name)
        return Sample(rows)


def _rows_of(inputs: Tensor) -> Tensor:
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def _not_finite(name: str) -> CalibrationError:
    return CalibrationError(
        f"The inputs of '{name}' hold NaN or Inf on the calibration text; "
        "check the weights before it, or run the model in float32 (`dtype` float32)."
    )


def mirror(total: Tensor) -> Tensor:
    """Complete, in place, the symmetric matrix whose block upper triangle `add_gram` summed. (in, in)"""
    for start in range(0, len(total), _PANEL):
        stop = min(start + _PANEL, len(total))
        diagonal = total[start:stop, start:stop]
        total[start:stop, start:stop] = (diagonal + diagonal.T) / 2
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def add_gram(
    total: Tensor,  # (in, in) float64; only the block upper triangle is added to
    rows: Tensor,  # (token, in)
) -> None:
    """total += rows^T rows on and above the block diagonal, in place."""
    width = rows.shape[1]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
