"""The E8P lattice code of QuIP# (Tseng et al., arXiv 2402.04396, section 4.2), built from its definition.

8 weights at a time. A code word is s * a + h: a one of 256 patterns of absolute values, s signs, h = +1/4 or -1/4 in
all coordinates. The 227 patterns with |a|^2 <= 10 over {1/2, 3/2, 5/2} are completed by 29 of the 56 with five 3/2 and
three 1/2; which 29 makes no measurable difference (Gaussian error 0.0915-0.0916), so the first in lexicographic order
are taken. Signs have the parity that makes the sum of s * a even (the lattice D8 shifted by 1/2), so the eighth sign is
implied: 8 + 1 + 7 = 16 bits for 8 weights. All 65,536 words lie in E8 + 1/4.

Residual stages: e8-3 adds the nearest of 256 points (0, the 240 roots of E8, 15 of the 16 vectors 2 e_i) to the
residual times 2.04, e8-4 a second E8P word to the residual times 3.45. At 4 bits the lattice has no advantage over a
scalar code.

The search is exact: the best pattern of an orbit is the sorted one, and the sorted assignment also makes the penalty
for a wrong sign parity least, so 7 leaders stand for 227 patterns; the 29 others are tried only where a bound allows.

Stored parts: `weight` uint8 (out, words, 2 or 3 or 4), `scales` float16 (out, 1): RMS of the row over the stage's best
scale for normal weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import constant, decoded_linear, in_chunks
from .packing import gather

BLOCK = 8
_CHUNK = 32768  # rows of the search at a time: what the caches hold
_EXTRAS = 29


@cache
def _patterns() -> Tensor:
    """(256, 8) absolute values in halves of odd numbers; the last 29 are those with |a|^2 = 12."""
    inside, outside = [], []
    for halves in itertools.product((1, 3, 5), repeat=BLOCK):
        square = sum(h * h for h in halves) / 4
        if square <= 10:
            inside.append(halves)
        elif square == 12 and max(halves) == 3:
            outside.append(halves)
    assert len(inside) == 227 and len(outside) == 56
    return torch.tensor(inside + outside[:_EXTRAS], dtype=torch.float32) / 2


@cache
def _pattern_ids() -> Tensor:
    """(3^8,) id of the pattern with coordinates 1/2, 3/2, 5/2 by base-3 digits, first coordinate lowest; -1: none."""
    digits = (_patterns() - 0.5).to(torch.long)
    table = torch.full((3**BLOCK,), -1, dtype=torch.long)
    table[(digits * 3 ** torch.arange(BLOCK)).sum(1)] = torch.arange(len(digits))
    return table


@constant
def codebook() -> Tensor:
    """(65536, 8) float32: word = pattern id + 256 * (h > 0) + 512 * (negative coordinates 0..6, first lowest)."""
    words = torch.arange(2**16)
    absolute = _patterns()[words & 255]
    negative = ((words[:, None] >> (9 + torch.arange(BLOCK - 1))) & 1).bool()
    wanted = absolute.sum(1).long() % 2  # parity of the number of negatives
    last = (negative.sum(1) + wanted) % 2 == 1
    signs = torch.where(torch.cat([negative, last[:, None]], 1), -1.0, 1.0)
    return signs * absolute + torch.where((words >> 8) & 1 == 1, 0.25, -0.25)[:, None]


def _best_of_coset(y: Tensor) -> tuple[Tensor, Tensor]:
    """For rows y (n, 8): the score <y, v> - |v|^2 / 2 of the best v = s * a, and its |a| as base-3 digits (n, 8)."""
    size = y.abs()
    ordered, order = size.sort(1, descending=True)
    odd = (y < 0).sum(1) % 2  # parity of the negatives of y
    half = ordered.sum(1) / 2
    sums = ordered[:, :4].cumsum(1)
    zero = torch.zeros_like(half)
    dots = torch.stack(
        [zero, sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3], 2 * ordered[:, 0], 2 * ordered[:, 0] + ordered[:, 1]], 1
    )
    squares = torch.tensor([1.0, 2, 3, 4, 5, 4, 5], device=y.device)  # |a|^2 / 2
    parity = torch.tensor([0, 1, 0, 1, 0, 0, 1], device=y.device)  # of the sum of a
    penalty = (parity != odd[:, None]) * ordered[:, 7:]  # the smallest |y| changes its sign: 2 * |y| * 1/2
    scores = half[:, None] + dots - squares - penalty
    best, leader = scores.max(1)
    leaders = torch.zeros(7, BLOCK, dtype=torch.long, device=y.device)
    for k in range(1, 5):
        leaders[k, :k] = 1
    leaders[5, 0] = leaders[6, 0] = 2
    leaders[6, 1] = 1
    digits = torch.zeros_like(order).scatter_(1, order, leaders[leader])
    # 56 patterns with five 3/2: at most this, whichever 29 are in the book
    bound = 3 * half - ordered[:, 5:].sum(1) - 6
    rows = (bound > best).nonzero().squeeze(1)
    if len(rows):
        extras = _patterns()[-_EXTRAS:].to(y.device)
        products = size[rows, None] * extras  # (rows, 29, 8)
        mismatch = (extras.sum(1).long() % 2) != odd[rows, None]
        other = products.sum(2) - 6 - mismatch * 2 * products.amin(2)
        value, which = other.max(1)
        better = value > best[rows]
        best[rows[better]] = value[better]
        digits[rows[better]] = (extras[which[better]] - 0.5).long()
    return best, digits


def _words_of_coset(y: Tensor, digits: Tensor, positive: Tensor) -> Tensor:
    """The code words for the chosen |a| of rows y = x - h."""
    negative = y < 0
    absolute = digits.to(y.dtype) + 0.5
    wrong = (negative.sum(1) + absolute.sum(1).long()) % 2 == 1
    cheapest = (y.abs() * absolute).argmin(1)
    flip = torch.nn.functional.one_hot(cheapest, BLOCK).bool() & wrong[:, None]
    negative = negative ^ flip
    ids = _pattern_ids().to(y.device)[(digits * 3 ** torch.arange(BLOCK, device=y.device)).sum(1)]
    signs = (negative[:, :-1].long() << (9 + torch.arange(BLOCK - 1, device=y.device))).sum(1)
    return ids + (positive.long() << 8) + signs


def nearest_words(
    x: Tensor,  # (n, 8) float32
) -> Tensor:
    """The code word nearest to each row. (n,) int64"""
    found = []
    for part in x.split(_CHUNK):
        up, down = part - 0.25, part + 0.25
        score_up, digits_up = _best_of_coset(up)
        score_down, digits_down = _best_of_coset(down)
        positive = up.square().sum(1) - 2 * score_up <= down.square().sum(1) - 2 * score_down
        y = torch.where(positive[:, None], up, down)
        digits = torch.where(positive[:, None], digits_up, digits_down)
        found.append(_words_of_coset(y, digits, positive))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=x.device)


@constant
def small_book() -> Tensor:
    """(256, 8) float32: 0, the 240 roots of E8 and 15 of the 16 vectors +-2 e_i."""
    points = [torch.zeros(BLOCK)]
    for i, j in itertools.combinations(range(BLOCK), 2):
        for a, b in itertools.product((1.0, -1.0), repeat=2):
            root = torch.zeros(BLOCK)
            root[i], root[j] = a, b
            points.append(root)
    for signs in itertools.product((0.5, -0.5), repeat=BLOCK):
        if sum(s < 0 for s in signs) % 2 == 0:
            points.append(torch.tensor(signs))
    for i in range(BLOCK):
        for a in (2.0, -2.0):
            point = torch.zeros(BLOCK)
            point[i] = a
            points.append(point)
    return torch.stack(points[:256])


def nearest_small(x: Tensor) -> Tensor:
    """Index into small_book of the point nearest to each row (n, 8). (n,) int64"""
    book = small_book().to(x)
    half = book.square().sum(1) / 2
    return torch.cat([(part @ book.T - half).argmax(1) for part in x.split(_CHUNK)])


@dataclass(frozen=True)
class _E8:
    """A row scale and one or two code words for each 8 weights; a short last block is padded with zeros."""

    name: ClassVar[str]
    bytes_per_block: ClassVar[int]
    ratio: ClassVar[float]  # what the residual is multiplied by before the second stage
    best_scale: ClassVar[float]  # of unit normal weights before rounding

    def round_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(codes (n, bytes) uint8, decoded (n, 8)) of blocks of about unit variance, already times best_scale."""
        words = nearest_words(blocks)
        codes = _to_bytes(words)
        decoded = self.points(words)
        if self.bytes_per_block > 2:
            rest = (blocks - decoded / 4) * self.ratio
            second = nearest_small(rest) if self.bytes_per_block == 3 else nearest_words(rest)
            codes = torch.cat(
                [codes, second[:, None].to(torch.uint8) if self.bytes_per_block == 3 else _to_bytes(second)], 1
            )
            decoded = self.points(words, second)
        return codes, decoded / 4

    def points(self, words: Tensor, second: Tensor | None = None) -> Tensor:
        """4 times the sum of the stages. (n, 8) float32"""
        device = str(words.device)
        values = gather(_quarters(device), words).float()
        if second is not None:
            book = _small_quarters(device) if self.bytes_per_block == 3 else _quarters(device)
            values += gather(book, second).float().mul_(1 / self.ratio)
        return values.view(-1, BLOCK)

    def row_scales(self, weight: Tensor) -> Tensor:
        """(out, 1) float16: what decoded blocks are multiplied by."""
        rms = weight.detach().float().square().mean(1, keepdim=True).sqrt()
        return (rms / self.best_scale).half()

    def blocks_of(self, width: int) -> int:
        return -(-width // BLOCK)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        out, width = weight.shape
        scales = self.row_scales(weight)
        factor = scales.float()
        values = torch.where(factor == 0, torch.zeros((), device=weight.device), weight.detach().float() / factor)
        values = torch.nn.functional.pad(values, (0, self.blocks_of(width) * BLOCK - width))
        codes, _ = self.round_blocks(values.reshape(-1, BLOCK))
        return {"weight": codes.view(out, -1, self.bytes_per_block), "scales": scales}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return in_chunks(self, parts, shape, dtype)

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        codes = parts["weight"].flatten(0, 1)
        values = self.points(_word(codes, 0), None if self.bytes_per_block == 2 else self.second_words(codes))
        quarter = parts["scales"].float() / 4  # exact, as every multiple of a power of two
        torch.mul(values.view(out.shape[0], -1)[:, : out.shape[1]], quarter, out=out)

    def second_words(self, codes: Tensor) -> Tensor:
        return codes[:, 2].to(torch.int32) if self.bytes_per_block == 3 else _word(codes, 1)

    def row_step(self, shape: tuple[int, int]) -> int:
        return 1

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        return parts | {name: parts[name][start:stop] for name in ("weight", "scales")}

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        size = (shape[0], self.blocks_of(shape[1]), self.bytes_per_block)
        return {
            "weight": torch.empty(size, dtype=torch.uint8, device=device),
            "scales": torch.empty(shape[0], 1, dtype=torch.float16, device=device),
        }

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return decoded_linear(x, self, parts, shape)

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> BlockRounder:
        """Rounds 8 columns at a time in the row scales of `weight` times `stretch`."""
        return BlockRounder(self, weight, stretch)

    def options(self) -> dict[str, Any]:
        return {}


class BlockRounder:
    """A matrix being rounded 8 columns at a time (ldlq.Rounder)."""

    block = BLOCK

    def __init__(self, form: _E8, weight: Tensor, stretch: float | Tensor):
        self._form = form
        self._scales = (form.row_scales(weight).float() * stretch).half()
        self._factor = self._scales.float()
        size = (weight.shape[0], form.blocks_of(weight.shape[1]), form.bytes_per_block)
        self._codes = torch.empty(size, dtype=torch.uint8, device=weight.device)

    def round(self, values: Tensor, start: int) -> Tensor:
        width = values.shape[1]
        scaled = torch.where(self._factor == 0, torch.zeros_like(values), values / self._factor)
        codes, decoded = self._form.round_blocks(torch.nn.functional.pad(scaled, (0, BLOCK - width)))
        self._codes[:, start // BLOCK] = codes
        return decoded[:, :width] * self._factor

    def parts(self) -> dict[str, Tensor]:
        return {"weight": self._codes, "scales": self._scales}


def _to_bytes(words: Tensor) -> Tensor:
    return torch.stack([words & 255, words >> 8], 1).to(torch.uint8)


def _word(codes: Tensor, place: int) -> Tensor:
    """A 16-bit word of each block (n, bytes). (n,) int32"""
    if codes.shape[1] % 2 == 0:
        return codes.view(torch.int16)[:, place].to(torch.int32).bitwise_and_(0xFFFF)  # the same on little-endian hosts
    return (codes[:, 1].to(torch.int32) << 8) + codes[:, 0]


@constant
def _quarters(device: str) -> Tensor:
    """The code book times 4, (65536, 8) int8: 512 KiB, which stays in the second-level cache."""
    return (codebook() * 4).to(torch.int8).to(device)


@constant
def _small_quarters(device: str) -> Tensor:
    """The book of the 1-bit stage times 4, (256, 8) int8."""
    return (small_book() * 4).to(torch.int8).to(device)


class E8P2(_E8):
    """E8P, 2 bits."""

    name: ClassVar[str] = "e8-2"
    bytes_per_block: ClassVar[int] = 2
    best_scale: ClassVar[float] = 1.03


class E8P3(_E8):
    """E8P and a 1-bit stage, 3 bits."""

    name: ClassVar[str] = "e8-3"
    bytes_per_block: ClassVar[int] = 3
    ratio: ClassVar[float] = 2.04
    best_scale: ClassVar[float] = 0.98


class E8P4(_E8):
    """E8P twice, 4 bits."""

    name: ClassVar[str] = "e8-4"
    bytes_per_block: ClassVar[int] = 4
    ratio: ClassVar[float] = 3.45
    best_scale: ClassVar[float] = 0.98
