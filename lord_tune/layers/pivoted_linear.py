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

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..kept import Standin
from .quantized_linear import NO_WRITING, CastLinear, Stored


def pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, C, B) with L R = P [I; C] B, float64: rows (r,) int32, increasing, those of L R that B holds.

    left: (m, r), r <= m; right: (r, n). Where L has not the full rank r, the product is the same all the same.
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
    rows, by_row = order[:rank].sort()
    others = order[rank:].argsort()
    chosen = left.double()[rows] @ right.double()
    return rows.to(torch.int32), rest[others][:, by_row].contiguous(), chosen


def places_of(rows: Tensor, count: int) -> Tensor:
    """(count,) int64: which entry of [z; C z] each output is."""
    chosen = torch.zeros(count, dtype=torch.bool, device=rows.device)
    chosen[rows.long()] = True
    return torch.where(chosen, chosen.cumsum(0) - 1, len(rows) + (~chosen).cumsum(0) - 1)


def pivoted_left(rest: Tensor, rows: Tensor) -> Tensor:
    """P [I; C] (out, rank) of C (out - rank, rank)."""
    identity = torch.eye(len(rows), dtype=rest.dtype, device=rest.device)
    return torch.cat([identity, rest])[places_of(rows, len(rows) + len(rest))]


class PivotedLinear(nn.Linear):
    """z -> L z with L = P [I; C] (out, rank): `rest` is C; `rows` (rank,) int32, increasing, the outputs that are z."""

    def __init__(self, rest: CastLinear, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = rest.in_features, rest.in_features + rest.out_features
        self._is_hf_initialized = True
        self._places: Tensor | None = None
        self.register_parameter("bias", None)
        self.rest = rest
        self.rows: nn.Parameter = Stored(torch.empty(self.in_features, dtype=torch.int32, device=device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        shape, dtype = (self.out_features, self.in_features), self.rest.weight.dtype
        return Standin(shape, dtype, self.rows.device, lambda: self.dense(dtype), NO_WRITING)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what a loader assigns."""
        if name == "rows":
            self._places = None
            if type(param) is nn.Parameter:
                param = Stored(param.data)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PivotedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._places = None
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = None

    def places(self) -> Tensor:
        """(out,) int64: which entry of [z; C z] each output is."""
        if self._places is not None and not is_fake(self.rows):
            return self._places
        with torch.inference_mode(False):
            found = places_of(self.rows, self.out_features)
        if not is_fake(found):  # as torch.export makes them, which leaves this module in use
            self._places = found
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """L (out, rank)."""
        return pivoted_left(self.rest.weight.to(dtype), self.rows)

    def forward(self, z: Tensor) -> Tensor:  # (..., rank) -> (..., out)
        return torch.cat([z, self.rest(z)], -1).index_select(-1, self.places())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
