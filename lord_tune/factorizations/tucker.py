"""Tucker decomposition of a weight (Moar et al., arXiv 2405.06626): U G V^T, without calibration text.

    min ||W - U G V^T||_F,  U (out, r) and V (in, r) with orthonormal columns, core G = U^T W V (r, r)

A matrix has two modes. HOOI (De Lathauwer et al. 2000, algorithm 4.2) sets U to the leading left singular vectors of
W V and V to the leading right ones of U^T W in turn: it stands still at the leading singular vectors of W, where G is
diagonal. So it is truncated SVD with a core that nothing needs. Merged into a factor it costs no number:

    L = U,  R = G V^T = U^T W V V^T = U^T W     (V spans the rows of U^T W)

which is what is stored. What the paper adds is the choice of layers, tensors and rank, rank 1 included: decoder blocks
that are apart, neither the first nor the last (`allocation` spread). Like plain SVD it does not see the inputs;
scripts/study_tucker.py measures it beside `whitened` at the same layers and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .svd import PlainSVD


@dataclass(frozen=True)
class Tucker(PlainSVD):
    """min ||W - U G V^T||_F, the core in R."""

    name: ClassVar[str] = "tucker"
