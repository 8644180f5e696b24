"""Activation-whitened SVD: min ||(W - L R) X||_F, the optimum for the layer's output on the calibration text.

The same optimum as SVD-LLM (Wang et al., arXiv 2403.07378, section 3.2), DRONE, QERA-exact for residuals, and
uncentred AFM. They whiten with a Cholesky factor or an inverse square root of H; this is the projector form
W' = U_r U_r^T W with U the eigenvectors of W H W^T, which needs no inverse: a singular H (dead channels, fewer tokens
than channels) or massive activations are no special case.

Beside a backbone Q is rounded with error feedback under the same H (quantizers/ldlq.py), then W - Q is factorized:
`rounding="nearest"` is what QERA and EoRA do.

`sink_weight` adds weight to the tokens at position 0 (see Moments.sink_moment). It moves the optimum by design, so the
calibrated error is then slightly above the smallest possible.

`shrinkage` s replaces H by (1 - s) H + s diag(H) when the basis is chosen: with few tokens the off-diagonal entries
are mostly noise. The driver can choose it per layer by held-out error (`--shrinkage auto`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..calibration.moments import Moments
from ..declared import option
from ..errors import UsageError
from .base import Core, Projection, rounding_option

SHRINKAGES = (0.0, 0.05, 0.15, 0.4)  # what "auto" chooses from


@dataclass(frozen=True)
class Whitened(Projection):
    """Eigenvectors of W H W^T."""

    name: ClassVar[str] = "whitened"
    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})
    sink_weight: float = option(0.05, "extra weight of position-0 inputs (attention sinks) in the Gram matrix", ge=0)
    shrinkage: float | Literal["auto"] = option(
        0.0, "share of the Gram matrix's diagonal; auto: per layer, by held-out error"
    )
    rounding: Literal["feedback", "nearest"] = rounding_option()

    def __post_init__(self) -> None:
        if self.shrinkage != "auto" and not 0 <= self.shrinkage <= 1:
            raise UsageError(f"Got shrinkage {self.shrinkage}; expected a fraction from 0 to 1, or auto.")

    @property
    def shrunk(self) -> float | None:
        return None if self.shrinkage == "auto" else self.shrinkage

    def candidates(self) -> tuple[Whitened, ...]:
        if self.shrinkage != "auto":
            return (self,)
        return tuple(replace(self, shrinkage=amount) for amount in SHRINKAGES)

    def selection(self, core: Core, moments: Moments | None) -> tuple[Tensor, Tensor | None]:
        assert moments is not None and core.outputs is not None, "the driver collects what `needs` names"
        assert self.shrinkage != "auto", "a candidate is chosen first"
        moment = core.outputs
        if self.shrinkage:
            scaled = core.matrix * moments.gram.diagonal().clamp_min(0).sqrt()
            moment = (1 - self.shrinkage) * moment + self.shrinkage * scaled @ scaled.T
        if self.sink_weight:
            moment = moment + self.sink_weight * moments.sink_moment(core.matrix)
        return moment, None
