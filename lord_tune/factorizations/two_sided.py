"""Two-sided whitening: the error of the outputs is weighed by what the loss notices of them.

    min ||A (W - W') S||_F,   S S^T = H = E[x x^T],   A^T A = G = E[g g^T]

g is the gradient of the summed loss by the layer's output (calibration/sensitivity.py). To second order, with K-FAC's
assumption that x and g are independent (Martens and Grosse, arXiv 1503.05671), tr(G (W - W') H (W - W')^T) is the
increase of the loss: IO-SVD (arXiv 2605.15626) and OBD-LLM (arXiv 2604.00821) whiten by both moments. The optimum is
A^-1 [A W S]_r S^-1, again a projection of the outputs, now an oblique one:

    W' = L R,   L = A^-1 V_r,   R = V_r^T A W,   V the eigenvectors of A W H W^T A^T

Only G is inverted, and in the coordinates of W's smaller side (base.py: with W = Q M it is Q^T G Q, because L need not
leave the range of W). Which root A of it is taken does not matter; it is a Cholesky factor. G has rank at most the
number of tokens of the backward pass, and a direction that no token's loss noticed is not free, so G is damped:

    G_d = (1 - d) G + d tr(G) / out I

d = 1 is `whitened`. The eigenvalues are the predicted loss of the dropped directions (in G_d), so that `loss_weighted`
allocation takes them as they are, without a backward pass of its own.

A layer whose outputs get no gradient (an expert that no token of the backward pass chose) has G = 0: it is factorized
as `whitened` does, with a warning, and its predicted loss is 0.

SmolLM2-135M, 20 % removed, pivoted, `loss_weighted`, 16,384 tokens of code to calibrate on: perplexity on held-out code
and on WikiText-2 (4,096 tokens each) 10.73 and 45.7, against 11.35 and 50.2 of `whitened`; 34 layers stay dense instead
of 59. With d = 0.01 it is 10.69 and 48.1.
Beside NF4 at rank 16, rounded to the nearest: 9.79 and 27.7, against 9.94 and 27.8.

Beside a backbone Q the residual W - Q is factorized. Q is rounded row by row, so that the weights of the outputs change
nothing there. L and R in low precision are rounded to fit L R, with every output weighing alike. Errors in the records
are those of the plain outputs, as for any other method, and so above those of `whitened` on the calibration text, by
design.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..declared import option
from ..errors import UsageError
from .base import Core, Metric, Projection, rounding_option
from .whitened import Whitened

LEAST_DAMPING = 1e-6  # in float64 a Cholesky factor exists


@dataclass(frozen=True)
class TwoSided(Projection):
    """Eigenvectors of A W H W^T A^T, A^T A the damped second moment of the loss gradients at the outputs."""

    name: ClassVar[str] = "two_sided"
    needs: ClassVar[frozenset[str]] = frozenset({"input_gram", "output_gram"})
    sink_weight: float = option(0.05, "extra weight of position-0 inputs (attention sinks) in the Gram matrix", ge=0)
    damping: float = option(
        0.1,
        "share of the identity in the gradients' second moment; 1 weighs all outputs alike, as whitened does",
        at_rank_0=False,
        ge=LEAST_DAMPING,
        le=1,
    )
    rounding: Literal["feedback", "nearest"] = rounding_option()

    def __post_init__(self) -> None:
        if not LEAST_DAMPING <= self.damping <= 1:
            raise UsageError(f"Got damping {self.damping}; expected a fraction from {LEAST_DAMPING:g} to 1.")

    def selection(self, core: Core, moments: Moments | None) -> tuple[Tensor, Tensor | None]:
        return Whitened(self.sink_weight).selection(core, moments)

    def metric(self, core: Core, output_gram: Tensor | None) -> Metric | None:
        assert output_gram is not None, "the driver measures what `needs` names"
        gram = output_gram.to(core.matrix)
        mean = float(gram.diagonal().mean())
        identity = torch.eye(len(core.matrix), dtype=gram.dtype, device=gram.device)
        if not mean > 0:
            return Metric(identity, 0.0)
        if core.rotation is not None:
            gram = core.rotation.T @ gram @ core.rotation
        gram = (gram + gram.T) / (2 * mean)
        return Metric((1 - self.damping) * gram + self.damping * identity, mean)
