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
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..declared import Options
from .base import Format, constant, in_chunks, stored_half, stored_scales
from .packing import gather

BLOCK = 8
_CHUNK = 32768  # rows of the search at a time: what the caches hold
_EXTRAS = 29


@constant
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


@dataclass(frozen=True)
class _Search:
    """Constant tensors of the search on one device. A choice is one of 7 leaders, or 7 + k for the extra pattern k."""

    shifts: Tensor  # (2, 1, 1): what is added to x before the search in each coset
    dots: Tensor  # (8, 8): sorted |y| to scores; one column per leader, the last for five 3/2 (any of 56 patterns)
    squares: Tensor  # (8,): -|a|^2 / 2
    signs: Tensor  # (8, 2): negative coordinates to (their bits in the word, their number)
    extras: Tensor  # (29, 8)
    powers: Tensor  # (8,): 3^k
    digits: Tensor  # (36, 4): of the largest, second, ... |y| in base 3, for each choice; extras: 0
    offsets: Tensor  # (36,): added to the base-3 number, so that extras have rows of their own behind the patterns
    ids: Tensor  # (3^8 + 29,): pattern by base-3 number
    parity: Tensor  # (36,): of the sum of a
    bits: Tensor  # (8,): the sign bit of a coordinate in the word; the last is implied


@constant
def _search(device: str) -> _Search:
    leaders = torch.full((8, BLOCK), 0.5)
    for k in range(1, 5):
        leaders[k, :k] = 1.5
    leaders[5, 0] = leaders[6, 0] = 2.5
    leaders[6, 1] = 1.5
    leaders[7, :5] = 1.5
    odd = leaders.sum(1) % 2
    dots = leaders.T.clone()
    dots[7] *= 1 - 2 * odd  # the smallest |y| comes with the sign that an even pattern gives it
    bits = torch.tensor([*(1 << (9 + i) for i in range(BLOCK - 1)), 0])
    patterns = _patterns()
    ids = torch.full((3**BLOCK + _EXTRAS,), -1)
    ids[((patterns - 0.5).long() * 3 ** torch.arange(BLOCK)).sum(1)] = torch.arange(len(patterns))
    ids[-_EXTRAS:] = torch.arange(len(patterns) - _EXTRAS, len(patterns))
    found = _Search(
        shifts=torch.tensor([-0.25, 0.25])[:, None, None],
        dots=dots,
        squares=-leaders.square().sum(1) / 2,
        signs=torch.stack([bits.float(), torch.ones(BLOCK)], 1),
        extras=patterns[-_EXTRAS:],
        powers=3 ** torch.arange(BLOCK),
        digits=torch.cat([(leaders[:7, :4] - 0.5).long(), torch.zeros(_EXTRAS, 4, dtype=torch.long)]),
        offsets=torch.cat([torch.zeros(7, dtype=torch.long), 3**BLOCK + torch.arange(_EXTRAS)]),
        ids=ids,
        parity=torch.cat([odd[:7], torch.ones(_EXTRAS)]),
        bits=bits,
    )
    return _Search(*(getattr(found, field.name).to(device) for field in fields(found)))


def _extra_patterns(
    size: Tensor,  # (n, 8): |y|
    odd: Tensor,  # (n,): parity of the negatives of y
    search: _Search,
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, choice, coordinate cheapest to change the sign of) of the best of the 29."""
    costs = size[:, None] * search.extras  # (n, 29, 8)
    least, where = costs.min(2)
    best, which = (costs.sum(2) - 6 - 2 * (1 - odd[:, None]) * least).max(1)
    return best, which + 7, where.gather(1, which[:, None]).squeeze(1)


def _nearest_words(x: Tensor, search: _Search) -> Tensor:
    """Few operations on both cosets at once: error feedback comes with a few hundred rows at a time."""
    n = len(x)
    y = (x + search.shifts).reshape(2 * n, BLOCK)
    size = y.abs()
    ordered, order = size.sort(1, descending=True)
    sign_bits, negatives = ((y < 0).to(y.dtype) @ search.signs).unbind(1)
    odd = negatives.remainder_(2)
    ordered[:, 7].mul_(1 - 2 * odd)
    scores = torch.addmm(search.squares, ordered, search.dots)
    best, choice = scores.max(1)
    wide = choice == 7  # the bound of the 29 extra patterns is above all leaders
    if x.device.type != "cpu":  # all rows are tried: to know how many need it, the host would wait for the device
        value, leader = scores[:, :7].max(1)
        other, extra, cheapest = _extra_patterns(size, odd, search)
        better = wide & (other > value)
        best = torch.where(wide, torch.maximum(value, other), best)
        choice = torch.where(better, extra, torch.where(wide, leader, choice))
        order[:, 7] = torch.where(better, cheapest, order[:, 7])
    elif len(rows := wide.nonzero().squeeze(1)):
        value, leader = scores[rows, :7].max(1)
        other, extra, cheapest = _extra_patterns(size[rows], odd[rows], search)
        better = other > value
        best[rows] = torch.maximum(value, other)
        choice[rows] = torch.where(better, extra, leader)
        order[rows, 7] = torch.where(better, cheapest, order[rows, 7])
    # |y|^2 / 2 - score of the two cosets: |x - 1/4|^2 - |x + 1/4|^2 = -sum of x
    positive = best[:n] - best[n:] + x.sum(1) / 2 >= 0
    chosen = torch.arange(n, device=x.device).add_(n * ~positive)
    choice, order = choice[chosen], order[chosen]
    ids = search.ids[(search.powers[order[:, :4]] * search.digits[choice]).sum(1) + search.offsets[choice]]
    flip = search.bits[order[:, 7]] * (search.parity[choice] != odd[chosen])
    return ids + (positive.long() << 8) + (sign_bits[chosen].long() ^ flip)


def nearest_words(
    x: Tensor,  # (n, 8) float32
) -> Tensor:
    """The code word nearest to each row. (n,) int64"""
    search = _search(str(x.device))
    found = [_nearest_words(part, search) for part in x.split(_CHUNK)]
    return torch.cat(found) if len(found) != 1 else found[0]


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
    book = _small_book(str(x.device)).to(x.dtype)
    half = book.square().sum(1) / 2
    return torch.cat([torch.addmm(-half, part, book.T).argmax(1) for part in x.split(_CHUNK)])


@dataclass(frozen=True)
class _E8(Format):
    """A row scale and one or two code words for each 8 weights; a short last block is padded with zeros."""

    name: ClassVar[str]
    bytes_per_block: ClassVar[int]
    ratio: ClassVar[float]  # what the residual is multiplied by before the second stage
    best_scale: ClassVar[float]  # of unit normal weights before rounding
    block: ClassVar[int] = BLOCK
    rotated_by_default: ClassVar[bool] = True

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

    def points(self, words: Tensor, second: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """4 times the sum of the stages. (n, 8) float32, in `out` if given"""
        device = str(words.device)
        first = gather(_quarters(device), words).view(-1, BLOCK)
        values = first.float() if out is None else out.copy_(first)
        if second is not None:
            book = _small_quarters(device) if self.bytes_per_block == 3 else _quarters(device)
            values += gather(book, second).float().view(-1, BLOCK).mul_(1 / self.ratio)
        return values

    def row_scales(self, weight: Tensor) -> Tensor:
        """(out, 1) float16: what decoded blocks are multiplied by."""
        rms = weight.detach().float().square().mean(1, keepdim=True).sqrt()
        return stored_scales(rms / self.best_scale, zero_is_a_code=False)

    def blocks_of(self, width: int) -> int:
        return -(-width // BLOCK)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        out, width = weight.shape
        scales = self.row_scales(weight)
        factor = scales.float()
        values = weight.detach().float() * _inverse(factor)
        values = torch.nn.functional.pad(values, (0, self.blocks_of(width) * BLOCK - width))
        codes, _ = self.round_blocks(values.reshape(-1, BLOCK))
        return {"weight": codes.view(out, -1, self.bytes_per_block), "scales": scales}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return in_chunks(self, parts, shape, dtype)

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        codes = parts["weight"].flatten(0, 1)
        second = None if self.bytes_per_block == 2 else self.second_words(codes)
        whole = out.view(-1, BLOCK) if out.shape[1] % BLOCK == 0 else None
        values = self.points(_word(codes, 0), second, whole).view(out.shape[0], -1)
        quarter = parts["scales"].float() / 4  # exact, as every multiple of a power of two
        torch.mul(values[:, : out.shape[1]], quarter, out=out)

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

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> BlockRounder:
        """Rounds 8 columns at a time in the row scales of `weight` times `stretch`."""
        return BlockRounder(self, weight, stretch)

    def options(self) -> Options:
        return {}


class BlockRounder:
    """A matrix being rounded 8 columns at a time (ldlq.Rounder)."""

    block = BLOCK

    def __init__(self, form: _E8, weight: Tensor, stretch: float | Tensor):
        self._form = form
        self._scales = stored_half(form.row_scales(weight).float() * stretch)
        self._factor = self._scales.float()
        self._inverse = _inverse(self._factor)
        size = (weight.shape[0], form.blocks_of(weight.shape[1]), form.bytes_per_block)
        self._codes = torch.empty(size, dtype=torch.uint8, device=weight.device)

    def round(self, values: Tensor, start: int) -> Tensor:
        width = len(values)
        scaled = values.T * self._inverse
        if width < BLOCK:
            scaled = torch.nn.functional.pad(scaled, (0, BLOCK - width))
        codes, decoded = self._form.round_blocks(scaled)
        self._codes[:, start // BLOCK] = codes
        return (decoded[:, :width] * self._factor).T

    def parts(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        every = slice(None) if rows is None else rows
        return {"weight": self._codes[every], "scales": self._scales[every]}


def _inverse(factor: Tensor) -> Tensor:
    """1 / factor, and 0 for rows of zeros."""
    return torch.where(factor == 0, 0.0, 1 / factor)


def _to_bytes(words: Tensor) -> Tensor:
    """(n,) -> (n, 2) uint8, low byte first"""
    return words.to(torch.int16).view(-1, 1).view(torch.uint8)


def _word(codes: Tensor, place: int) -> Tensor:
    """A 16-bit word of each block (n, bytes). (n,) int32"""
    if codes.shape[1] % 2 == 0:
        return codes.view(torch.int16)[:, place].to(torch.int32).bitwise_and_(0xFFFF)  # the same on little-endian hosts
    return codes[:, 1].to(torch.int32).bitwise_left_shift_(8).bitwise_or_(codes[:, 0])


@constant
def _quarters(device: str) -> Tensor:
    """The code book times 4, (65536, 8) int8: 512 KiB, which stays in the second-level cache."""
    return (codebook() * 4).to(torch.int8).to(device)


@constant
def _small_book(device: str) -> Tensor:
    return small_book().to(device)


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
