"""Dense packing of small integer codes into bytes, and decoding through lookup tables.

Codes run along the flattened matrix, so any shape packs without padding rows. 2-, 4- and 8-bit codes fill whole bytes,
first code in the low bits; eight 3-bit codes fill three bytes (two 12-bit words of four codes), eight 5-bit codes five
(four 10-bit words of two). The tail of a matrix
whose size is no multiple of the unit is padded with zeros. Decoding looks several codes up at once: a table of 256 or
4,096 rows of values is small enough for the caches, and `index_select` with int32 ids is the fast path on CPUs.

Where codes of a matrix start on a byte is where it can be cut (`aligned_codes`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODES_PER_WORD = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 8: 1}  # words of 8 bits, of 12 and 10 for 3- and 5-bit codes


_NUMBERS = {8: torch.int64, 16: torch.complex128}  # by bytes


def aligned_codes(bits: int) -> int:
    """Codes between two that start on a stored boundary."""
    return 8 if bits in (3, 5) else 8 // bits


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    if bits in (3, 5):
        return -(-count // 8) * bits
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape, integers below 2^bits -> (packed_bytes,) uint8."""
    flat = codes.reshape(-1).to(torch.int32)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % aligned_codes(bits)))
    per_word = CODES_PER_WORD[bits]
    shifts = torch.arange(per_word, dtype=torch.int32, device=flat.device) * bits
    words = (flat.view(-1, per_word) << shifts).sum(1, dtype=torch.int32)
    if bits == 5:
        a, b, c, d = words.view(-1, 4).unbind(1)
        parts = [a, (a >> 8) | (b << 2), (b >> 6) | (c << 4), (c >> 4) | (d << 6), d >> 2]
        return (torch.stack(parts, 1) & 255).reshape(-1).to(torch.uint8)
    if bits != 3:
        return words.to(torch.uint8)
    low, high = words.view(-1, 2).unbind(1)
    return torch.stack([low & 255, (low >> 8) | ((high & 15) << 4), high >> 4], 1).reshape(-1).to(torch.uint8)


def words_of(packed: Tensor, bits: int) -> Tensor:
    """The table rows to look up, int32: bytes, or for 3- and 5-bit codes words of 12 and 10 bits."""
    if bits == 5:
        a, b, c, d, e = packed.view(-1, 5).to(torch.int32).unbind(1)
        words = [a | (b & 3) << 8, b >> 2 | (c & 15) << 6, c >> 4 | (d & 63) << 4, d >> 6 | e << 2]
        return torch.stack(words, 1).view(-1)
    if bits != 3:
        return packed.to(torch.int32)
    first, second, third = packed.view(-1, 3).unbind(1)
    middle = second.to(torch.int32)
    low = (middle & 15).bitwise_left_shift_(8).add_(first)
    high = third.to(torch.int32).bitwise_left_shift_(4).add_(middle.bitwise_right_shift_(4))
    return torch.stack([low, high], 1).view(-1)


def word_table(values: Tensor, bits: int) -> Tensor:
    """(2^bits,) value of each code -> (words, codes per word) values of each word."""
    per_word = CODES_PER_WORD[bits]
    words = torch.arange(2 ** (per_word * bits), device=values.device)
    codes = (words[:, None] >> (torch.arange(per_word, device=values.device) * bits)) & (2**bits - 1)
    return values[codes].contiguous()


def gather(
    table: Tensor,  # (words, n)
    ids: Tensor,  # int32
    out: Tensor | None = None,  # contiguous, of the table's dtype
) -> Tensor:
    """Rows of a table one after another, flat; into `out` if there are as many as it holds. On CPUs rows of 8 and 16
    bytes move as one number each, which `index_select` does 3 to 5 times as fast as rows."""
    fits = out is not None and out.numel() == len(ids) * table.shape[1]
    flat = out.view(-1) if fits and out is not None else table.new_empty(len(ids) * table.shape[1])
    number = _NUMBERS.get(table.shape[1] * table.element_size()) if table.device.type == "cpu" else None
    if number is None:
        torch.index_select(table, 0, ids, out=flat.view(len(ids), -1))
    else:
        torch.index_select(table.view(number).view(-1), 0, ids, out=flat.view(number))
    return flat


def unpack_values(
    packed: Tensor, table: Tensor, bits: int, shape: tuple[int, ...], out: Tensor | None = None
) -> Tensor:
    """The value of every code, by `table` from word_table; in `out`, contiguous, where its size allows."""
    return gather(table, words_of(packed, bits), out)[: math.prod(shape)].view(shape)
