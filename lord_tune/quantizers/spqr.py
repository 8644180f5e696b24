"""Small groups of few bits and sparse outliers (SpQR, Dettmers et al., arXiv 2306.03078), from its mathematics.

Groups of 16 inputs of a row have affine codes of 3 bits: weight = scale * code + zero. The scales, and the zeros, are
themselves an affine 3-bit matrix (out, groups) in groups of 16 (Int3), so a small group costs 6 bits and not 32. About
1 % of the weights are left out of all this and stored in 16 bits as compressed sparse rows.

Which: a group's squared rounding error goes with the square of its range, so the weights chosen are those whose
removal, alone or with up to two others, reduces range^2 most per weight, times the importance of the group's inputs,
in a few rounds, so that a group can lose several. Their number is fixed by the shape, so that a loader knows the sizes
of all tensors. The zero is fitted to the decoded scale, so that both ends of the range share what the scale is off.

Bits per weight: bits + 2 * 3 / group_size + 4 * 16 / (16 * group_size) + 32 * outlier_fraction + 32 / in; at the
defaults 3 + 0.375 + 0.25 + 0.32 = 3.945, and 32 / in.

Stored parts: `weight` uint8, packed codes (0 under an outlier); `scale_codes` and `zero_codes` uint8, packed;
`scale_scales`, `scale_minimum`, `zero_scales`, `zero_minimum` float16 (out, groups / 16); `outlier_rows` int32
(out + 1,), where each row's outliers start; `outlier_columns` int16, the bits of an unsigned number; `outlier_values`
float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declared import Options, option
from ..errors import UsageError
from .base import Format, on_host, stored_half
from .grouped import Grouped, divisor_of
from .integer import Int2, Int3, Int4
from .packing import pack

_SECOND = Int3(group_size=16)  # of the matrices (out, groups) of scales and of zeros
_CODES: dict[int, type[Grouped]] = {2: Int2, 3: Int3, 4: Int4}
_ROUNDS = 8
_DEPTH = (
    3  # weights that leave a group together when the gain per weight is judged: one of two equal ones gains nothing
)
_LEAVING = [(k - below, below) for k in range(1, _DEPTH + 1) for below in range(k + 1)]  # (largest, smallest)
_LARGEST_WIDTH = 65535  # columns are stored in 16 bits
_LARGEST_VALUE = 65504.0  # of float16


@dataclass(frozen=True)
class SpQR(Format):
    """3.95 bits per weight."""

    name: ClassVar[str] = "spqr"
    group_size: int = option(16, "weights per scale", gt=0)
    bits: int = option(3, "bits of a weight that is no outlier", key="spqr_bits", ge=2, le=4)
    outlier_fraction: float = option(0.01, "fraction of weights kept in 16 bits", key="outliers", ge=0, lt=0.5)

    def __post_init__(self) -> None:
        if self.bits not in _CODES:
            raise UsageError(f"SpQR has no codes of {self.bits} bits; use one of {', '.join(map(str, _CODES))}.")
        if not 0 <= self.outlier_fraction <= 0.5:
            raise UsageError(f"Got outlier fraction {self.outlier_fraction}; expected a number from 0 to 0.5.")
        _CODES[self.bits](self.group_size)

    @property
    def inner(self) -> Grouped:
        """The codes, without scales."""
        return _CODES[self.bits](self.group_size)

    def outliers(self, shape: tuple[int, int]) -> int:
        """Their number."""
        if shape[1] > _LARGEST_WIDTH:
            raise UsageError(
                f"Got a layer of {shape[1]} inputs; SpQR numbers them with 16 bits and takes at most {_LARGEST_WIDTH}. "
                "Choose another format, or leave the layer out with `exclude`."
            )
        return round(self.outlier_fraction * shape[0] * shape[1])

    def group_scales(
        self,
        weight: Tensor,  # (out, in) float32
        sparse: Tensor,  # (out, in) bool, True at outliers
    ) -> dict[str, Tensor]:
        """The stored scales and zeros."""
        levels = 2**self.bits - 1
        inner = self.inner
        groups, counts = inner.grouped(weight)
        places = torch.arange(groups.shape[-1], device=weight.device)
        inside = ~inner.grouped(sparse)[0] & (places < counts[:, None])
        some = inside.any(-1)
        low = torch.where(some, torch.where(inside, groups, torch.inf).amin(-1), 0.0)
        high = torch.where(some, torch.where(inside, groups, -torch.inf).amax(-1), 0.0)
        scales = _SECOND.quantize((high - low) / levels)
        decoded = _SECOND.dequantize(scales, (low.shape[0], low.shape[1]), torch.float32)
        zeros = _SECOND.quantize((high + low) / 2 - decoded * (levels / 2))
        return _renamed("scale", scales) | _renamed("zero", zeros)

    def affine(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(scale, zero) of the groups, (out, groups) float32 each."""
        size = (shape[0], self.inner.groups_of(shape[1]))
        scale, zero = (_SECOND.dequantize(_second(name, parts), size, torch.float32) for name in ("scale", "zero"))
        return scale, zero

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        rounder = self.rounder(weight)
        values = weight.detach().float()
        for start in range(0, weight.shape[1], self.group_size):
            rounder.round(values[:, start : start + self.group_size].T, start)
        return rounder.parts()

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        scale, zero = self.affine(parts, shape)
        inner = {"weight": parts["weight"], "scales": scale, "minimum": zero}
        q = self.inner.dequantize(inner, shape, dtype)
        columns = parts["outlier_columns"].to(torch.int64) & 0xFFFF
        starts = torch.arange(0, shape[0] * shape[1], shape[1], device=columns.device)
        places = columns + starts.repeat_interleave(parts["outlier_rows"].diff(), output_size=len(columns))
        q.view(-1).index_copy_(0, places, parts["outlier_values"].to(dtype))
        return q

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        count, groups = self.outliers(shape), self.inner.groups_of(shape[1])
        second = _SECOND.empty((shape[0], groups), device)
        return (
            {"weight": self.inner.empty(shape, device)["weight"]}
            | _renamed("scale", second)
            | _renamed("zero", {name: torch.empty_like(value) for name, value in second.items()})
            | {
                "outlier_rows": torch.empty(shape[0] + 1, dtype=torch.int32, device=device),
                "outlier_columns": torch.empty(count, dtype=torch.int16, device=device),
                "outlier_values": torch.empty(count, dtype=torch.float16, device=device),
            }
        )

    def rows_apart(self, shape: tuple[int, int]) -> bool:
        return False

    def row_step(self, shape: tuple[int, int]) -> int:
        return math.lcm(self.inner.row_step(shape), _SECOND.row_step((shape[0], self.inner.groups_of(shape[1]))))

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        size = (shape[0], self.inner.groups_of(shape[1]))
        pointers = parts["outlier_rows"][start : stop + 1]
        first, last = 0, len(parts["outlier_values"])
        if (start, stop) != (0, shape[0]):
            known = on_host(parts["outlier_rows"])
            first, last = int(known[start]), int(known[stop])
        return (
            parts
            | {"weight": self.inner.code_rows(parts["weight"], shape, start, stop)}
            | _renamed("scale", _SECOND.rows(_second("scale", parts), size, start, stop))
            | _renamed("zero", _SECOND.rows(_second("zero", parts), size, start, stop))
            | {"outlier_rows": pointers - first}
            | {name: parts[name][first:last] for name in ("outlier_columns", "outlier_values")}
        )

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> SpQRRounder:
        """Rounds columns one by one in the scales of `weight` times `stretch`; outliers are chosen here."""
        return SpQRRounder(self, weight.detach().float(), stretch, importance)

    def options(self) -> Options:
        return {"group_size": self.group_size, "bits": self.bits, "outlier_fraction": self.outlier_fraction}


def _renamed(prefix: str, second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_codes" if name == "weight" else f"{prefix}_{name}": value for name, value in second.items()}


def _second(prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "weight": parts[f"{prefix}_codes"],
        "scales": parts[f"{prefix}_scales"],
        "minimum": parts[f"{prefix}_minimum"],
    }


def choose_outliers(
    groups: Tensor,  # (n, group) padded behind the true sizes
    counts: Tensor,  # (n,) true sizes
    importance: Tensor,  # (n,) >= 0: cost of an error anywhere in the group
    number: int,
) -> Tensor:
    """Where range^2 times importance falls most when the largest or smallest weights leave their group; greedily, in
    rounds of at most one weight per group: half of the number, a quarter, ..., at least 2^-_ROUNDS of it. (n, group)
    bool with `number` True"""
    inside = torch.arange(groups.shape[1], device=groups.device) < counts[:, None]
    ordered, order = torch.where(inside, groups, -torch.inf).sort(1, descending=True)
    first, last = torch.zeros_like(counts)[:, None], counts[:, None] - 1  # what is left of each sorted group

    def at(index: Tensor) -> Tensor:
        return ordered.gather(1, index.clamp(0, groups.shape[1] - 1))

    left, share = number, -(-number // 2)
    while left:
        tops = [at(torch.minimum(first + k, last)) for k in range(_DEPTH + 1)]
        bottoms = [at(torch.maximum(last - k, first)) for k in range(_DEPTH + 1)]
        square = (tops[0] - bottoms[0]).square()
        gain, top = torch.full_like(square, -torch.inf), torch.zeros_like(square, dtype=torch.bool)
        for above, below in _LEAVING:
            found = (square - (tops[above] - bottoms[below]).clamp(min=0).square()) / (above + below)
            top = torch.where(found > gain, above >= below, top)
            gain = torch.maximum(gain, found)
        usable = first <= last
        gain = torch.where(usable, gain * importance[:, None], -torch.inf).squeeze(1)
        take = min(left, share, int(usable.sum()))
        chosen = torch.zeros_like(usable).index_fill_(0, gain.topk(take).indices, True)
        first, last = first + (chosen & top), last - (chosen & ~top).long()
        left, share = left - take, max(share // 2, -(-number >> _ROUNDS))
    rank = torch.arange(groups.shape[1], device=groups.device)
    outside = ((rank < first) | (rank > last)) & inside
    return torch.zeros_like(outside).scatter_(1, order, outside)


class SpQRRounder:
    """A matrix being rounded column by column (ldlq.Rounder): an outlier takes the float16 of whatever comes."""

    block = 1

    def __init__(self, form: SpQR, weight: Tensor, stretch: float | Tensor, importance: Tensor | None):
        out, width = weight.shape
        number = form.outliers((out, width))
        inner = form.inner
        groups, counts = inner.grouped(weight)
        costs = torch.ones(width, device=weight.device) if importance is None else importance.to(weight)
        costs = inner.grouped(costs[None])[0].sum(-1).expand(out, -1)
        sparse = choose_outliers(groups.flatten(0, 1), counts.repeat(out), costs.reshape(-1), number)
        sparse = sparse.view(out, -1)[:, :width]
        scales = form.group_scales(weight, sparse)
        if isinstance(stretch, Tensor) or stretch != 1.0:
            scales = {
                name: value if name.endswith("_codes") else stored_half(value.float() * stretch)
                for name, value in scales.items()
            }
        self._form, self._inner, self._scales = form, inner, scales
        self._factor, self._offset = (part.T.contiguous() for part in form.affine(scales, (out, width)))
        self._divisor = divisor_of(self._factor)
        self._codes = torch.empty(width, out, dtype=torch.uint8, device=weight.device)
        self._rows, self._columns = sparse.nonzero(as_tuple=True)
        self._values = torch.zeros(number, dtype=torch.float16, device=weight.device)
        self._by_column = self._columns.argsort(stable=True)
        per_column = self._columns.bincount(minlength=width).cumsum(0)
        self._column_starts = [0, *per_column.tolist()]
        per_row = self._rows.bincount(minlength=out).cumsum(0)
        self._pointers = torch.nn.functional.pad(per_row, (1, 0)).to(torch.int32)

    def round(self, values: Tensor, start: int) -> Tensor:
        stop, group = start + len(values), start // self._form.group_size
        codes, decoded = self._inner.round_with(values, self._factor[group], self._offset[group], self._divisor[group])
        which = self._by_column[self._column_starts[start] : self._column_starts[stop]]
        rows, columns = self._rows[which], self._columns[which] - start
        kept = values[columns, rows].clamp(-_LARGEST_VALUE, _LARGEST_VALUE).half()
        self._values[which] = kept
        codes[columns, rows] = 0
        decoded[columns, rows] = kept.to(decoded.dtype)
        self._codes[start:stop] = codes
        return decoded

    def parts(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        assert rows is None, "the outliers are chosen over all rows"
        columns = torch.where(self._columns > 0x7FFF, self._columns - 0x10000, self._columns)
        return {
            "weight": pack(self._codes.T, self._form.bits),
            **self._scales,
            "outlier_rows": self._pointers,
            "outlier_columns": columns.to(torch.int16),
            "outlier_values": self._values,
        }
