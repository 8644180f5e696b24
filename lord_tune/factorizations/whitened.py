"""Activation-whitened SVD: min ||(W - L R) X||_F, the optimum for the layer's output on the calibration text.

The same optimum as SVD-LLM (Wang et al., arXiv 2403.07378, section 3.2), DRONE, QERA-exact for residuals, and
uncentred AFM. They whiten with a Cholesky factor or an inverse square root of H; this is the projector form
W' = U_r U_r^T W with U the eigenvectors of W H W^T, which needs no inverse: a singular H (dead channels, fewer tokens
than channels) or massive activations are no special case.

`sink_weight` adds weight to the tokens at position 0 (see Moments.weighted). It moves the optimum by design, so the
calibrated error is then slightly above the smallest possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.moments import Moments
from ..linalg import output_basis
from .base import Projection, Spectrum


@dataclass(frozen=True)
class Whitened(Projection):
    """Eigenvectors of W H W^T."""

    name: ClassVar[str] = "whitened"
    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})
    sink_weight: float = 0.05

    def spectrum(self, weight: Tensor, moments: Moments | None) -> Spectrum:
        assert moments is not None, "the driver collects what `needs` names"
        return Spectrum(*output_basis(weight, moments.weighted(self.sink_weight)))
