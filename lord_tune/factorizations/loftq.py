"""LoftQ (Li et al., arXiv 2310.08659, algorithm 1): alternate Q = quantize(W - L R) and L R = SVD_r(W - Q).

Data-free: the Frobenius norm of the weight error, no activations. It needs a quantizer. The iterate with the smallest
weight error is returned (the published algorithm returns the last, which is sometimes worse), so more iterations never
make it worse in its own norm; perplexity may still rise. Q is re-quantized from W - L R at the end of each iteration
and the factors belong to that very Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.moments import InputStatistics, Moments
from ..declared import option
from ..errors import UsageError
from ..linalg import output_basis
from ..quantizers import Quantizer
from .base import Fisher, Method, Spectrum, Split, truncate
from .tails import tail_curve


@dataclass(frozen=True)
class LoftQ(Method):
    """min ||W - Q - L R||_F by alternation, Q quantized."""

    name: ClassVar[str] = "loftq"
    needs: ClassVar[frozenset[str]] = frozenset()
    needs_backbone: ClassVar[bool] = True
    iterations: int = option(5, "alternations of Q and L R", gt=0)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"Got {self.iterations} iterations of LoftQ; expected at least 1.")

    @property
    def solves(self) -> int:
        return self.iterations

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
            raise UsageError("LoftQ splits W into Q + L R and needs a quantized backbone; pass `backbone` nf4.")
        w, shape = weight.double(), (weight.shape[0], weight.shape[1])
        best: Split | None = None
        best_error = float("inf")
        product = torch.zeros_like(w)
        for _ in range(self.iterations):
            parts = quantizer.quantize(w - product)
            backbone = quantizer.dequantize(parts, shape, w.dtype)
            spectrum = Spectrum(*output_basis(w - backbone, None))
            factors = truncate(w - backbone, spectrum, rank)
            product = factors.left @ factors.right
            error = float((w - backbone - product).norm())
            if error < best_error:
                curve = tail_curve(spectrum.energies, w.square().sum())
                best, best_error = Split(factors, parts, backbone, curve=curve), error
        assert best is not None, "weights are finite, so the first iteration is kept"
        return best
