"""Pivoted factors: a rank-r matrix in r (m + n - r) numbers instead of the r (m + n) of L and R.

Any W (m, n) of rank r has r rows from which all others follow: W = P [I; C] B with these rows B (r, n), C (m - r, r)
and a permutation P (PIFA, Zhao et al. 2025, arXiv 2501.19090, section 3). L R = (L G) (G^-1 R) for any invertible G:
the r^2 numbers of this freedom are spent on the identity. Nothing is lost, and y = W x takes fewer multiplications:
z = B x are r of the outputs, C z the others.

The rows are found on L alone, by LU with partial pivoting: L = P [L1; L2] U gives B = L1 U R and C = L2 L1^-1. No entry
of L1 and L2 is above 1, and those of C stay small (at most 1.8 in random matrices). In float64 the product is that of L
and R to 1e-14.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, C, B) with L R = P [I; C] B, float64: rows (r,) int32, increasing, those of L R that B holds.

    left: (m, r), r <= m; right: (r, n). Where L has not the full rank r, the product is the same all the same. Holds
    2 m r float64 beside its arguments and B.
    """
    rank = left.shape[1]
    factored, swaps, _ = torch.linalg.lu_factor_ex(left.double())  # a zero pivot does no harm here
    swapped = list(range(len(left)))
    for i, j in enumerate(swaps.tolist()):  # row i was exchanged with row j - 1, one after the other
        swapped[i], swapped[j - 1] = swapped[j - 1], swapped[i]
    order = torch.tensor(swapped, device=left.device)
    rest = torch.linalg.solve_triangular(  # which reads below the diagonal alone
        factored[:rank], factored[rank:], upper=False, left=False, unitriangular=True
    )
    del factored
    rows, by_row = order[:rank].sort()
    others = order[rank:].argsort()
    rest = rest[others[:, None], by_row]
    return rows.to(torch.int32), rest, left[rows].double() @ right.double()


def places_of(rows: Tensor, count: int) -> Tensor:
    """(count,) int64: which entry of [z; C z] each output is."""
    chosen = torch.zeros(count, dtype=torch.bool, device=rows.device)
    chosen[rows.long()] = True
    return torch.where(chosen, chosen.cumsum(0) - 1, len(rows) + (~chosen).cumsum(0) - 1)


def others_of(rows: Tensor, count: int) -> Tensor:
    """(count - r,) int64: the rows that C gives, increasing."""
    rest = torch.ones(count, dtype=torch.bool, device=rows.device)
    rest[rows.long()] = False
    return rest.nonzero()[:, 0]


def pivoted_left(rest: Tensor, rows: Tensor) -> Tensor:
    """P [I; C] (out, rank) of C (out - rank, rank)."""
    identity = torch.eye(len(rows), dtype=rest.dtype, device=rest.device)
    return torch.cat([identity, rest])[places_of(rows, len(rows) + len(rest))]
