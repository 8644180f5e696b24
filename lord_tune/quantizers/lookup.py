"""Matrices whose rows are looked up one by one: the embeddings of tokens, a row each.

Rounding is to the nearest, with a scale searched for each group (or each row, where a format scales whole rows or its
groups do not divide the row): of STRETCHES, what the format's own scale is multiplied by, the one of the least squared
error. An embedding meets no inputs that would say which errors cost more; of an output head they are known, and
decomposition/embedding.py rounds it with feedback (ldlq.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .base import Quantizer

STRETCHES = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
_BLOCK_STRETCHES = (0.95, 1.0, 1.05)  # of formats that search for the nearest of blocks: slow, and little is gained
AT_ONCE = 2**22  # weights rounded together


def check_lookup(form: Quantizer, shape: tuple[int, int]) -> None:
    """UsageError for a format whose rows do not lie apart in the stored parts of a matrix of this shape."""
    parts = form.empty(shape, "meta").values()
    whole = all(part.dim() > 0 and part.shape[0] % shape[0] == 0 for part in parts)
    if form.row_step(shape) != 1 or not form.rows_apart(shape) or not whole:
        raise UsageError(
            f"Got `embeddings` {form.name} for rows of {shape[1]} numbers, which do not start on a stored boundary of "
            "this format, so that no row could be decoded alone; use int8."
        )


def take_rows(
    form: Quantizer,
    parts: dict[str, Tensor],
    shape: tuple[int, int],
    ids: Tensor,  # (n,) integers
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of Q, decoded alone: to the bit those of `dequantize`. (n, in)"""
    taken = {}
    for name, part in parts.items():
        rows = part.reshape(shape[0], -1).index_select(0, ids)
        taken[name] = rows.reshape(len(ids) * (part.shape[0] // shape[0]), *part.shape[1:])
    if not len(ids):
        return torch.empty(0, shape[1], dtype=dtype, device=ids.device)
    return form.dequantize(taken, (len(ids), shape[1]), dtype)


def round_rows(form: Quantizer, weight: Tensor) -> dict[str, Tensor]:
    """The stored parts of a matrix (out, in), rounded to the nearest in searched scales."""
    shape = weight.shape[0], weight.shape[1]
    check_lookup(form, shape)
    step = max(1, AT_ONCE // shape[1])
    pieces = [_rounded(form, weight[start : start + step].float()) for start in range(0, shape[0], step)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _rounded(form: Quantizer, weight: Tensor) -> dict[str, Tensor]:
    out, width = weight.shape
    group = int(getattr(form, "group_size", None) or getattr(form, "block_size", None) or width)
    searched = weight.reshape(-1, group) if width % group == 0 else weight  # a row per scale
    columns = form.block if form.block > 1 else min(group, searched.shape[1])
    best = torch.full((len(searched),), torch.inf, device=weight.device)
    chosen = torch.ones(len(searched), 1, device=weight.device)
    for stretch in STRETCHES if form.block == 1 else _BLOCK_STRETCHES:
        rounder, error = form.rounder(searched, stretch), torch.zeros_like(best)
        for start in range(0, searched.shape[1], columns):
            values = searched[:, start : start + columns].T.contiguous()
            error += (rounder.round(values, start) - values).square().sum(0)
        better = error < best
        best = torch.where(better, error, best)
        chosen[better] = stretch
    rounder = form.rounder(searched, chosen)
    for start in range(0, searched.shape[1], columns):
        rounder.round(searched[:, start : start + columns].T.contiguous(), start)
    wanted = form.empty((out, width), "meta")
    return {name: part.reshape(wanted[name].shape) for name, part in rounder.parts().items()}
