"""Text to token windows: for calibration, with a held-out part, and for evaluation."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.texts import documents, token_ids
from ..errors import CalibrationError, LordWarning, UsageError
from ..protocols import Tokenizer


def token_windows(
    texts: list[str],
    tokenizer: Tokenizer,
    tokens: int,
    heldout_tokens: int,
    length: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """As `fill_windows`, and a warning where the text falls short."""
    calibration, heldout = fill_windows(texts, tokenizer, tokens, heldout_tokens, length, seed)
    count, wanted = len(calibration), -(-tokens // length)
    if count < wanted:
        warnings.warn(
            f"The calibration text fills {count} of {wanted} windows of {length} tokens; all of it is used.",
            LordWarning,
            stacklevel=2,
        )
    return calibration, heldout


def fill_windows(
    texts: list[str],
    tokenizer: Tokenizer,
    tokens: int,
    heldout_tokens: int,
    length: int,
    seed: int,
    name: str = "The calibration text",  # in errors
) -> tuple[Tensor, Tensor]:
    """Calibration and held-out windows, (window, length) ids each, from different documents where there are several.

    Documents are shuffled by `seed` and give at most two windows each before any gives more, so that the windows cover
    many of them. A single document is split by position. Text that is too short gives fewer windows. Raises
    CalibrationError when it does not fill one window of each.
    """
    if not texts:
        raise CalibrationError(f"{name} is empty; give files with text in them.")
    order = list(texts)
    random.Random(seed).shuffle(order)
    windows = -(-tokens // length), -(-heldout_tokens // length)
    wanted = sum(windows) * length
    encoded: list[list[int]] = []
    available = 0
    for text in order:
        encoded.append(token_ids(text, tokenizer, 2 * length))
        available += len(encoded[-1])
        if available >= wanted + 2 * length * 2 and len(encoded) > 1:
            break
    if available < wanted:
        encoded = [token_ids(text, tokenizer) for text in order]
        available = sum(map(len, encoded))
    if available < 2 * length:
        raise CalibrationError(
            f"{name} has {available} tokens; at least {2 * length} are needed (one window of {length} to calibrate, "
            "one held out). Give more text or a smaller `context_length`."
        )
    # a text that is too short for both keeps eight ninths to calibrate on
    share = windows[1] if available >= wanted else max(1, available // 9 // length)
    heldout = _take_heldout(encoded, available, min(windows[1], share) * length, length)
    flat = [token for document in encoded for token in document]
    count = min(windows[0], len(flat) // length)
    if count < 1:
        raise CalibrationError(
            f"{name} has {available} tokens in too few documents; give more than {2 * length} tokens."
        )
    return (torch.tensor(flat[: count * length]).view(count, length), torch.tensor(heldout).view(-1, length))


def _take_heldout(encoded: list[list[int]], available: int, wanted: int, length: int) -> list[int]:
    """Remove documents from the end of `encoded` (or the tail of the only one) and return `wanted` of their ids.

    `available`: all ids in `encoded`.
    """
    count, left = 0, available
    first = len(encoded)  # of the documents that are taken
    while first > 1 and count < wanted and left - len(encoded[first - 1]) >= length:
        first -= 1
        count += len(encoded[first])
        left -= len(encoded[first])
    taken = [token for document in encoded[first:] for token in document]
    del encoded[first:]
    if len(taken) < length:  # one long document is left: its tail is held out
        tail, missing = encoded.pop(), wanted - len(taken)
        taken = tail[-missing:] + taken
        encoded.append(tail[:-missing])
    return taken[: min(wanted, len(taken) // length * length)]


def file_windows(
    path: str,
    tokenizer: Tokenizer,
    length: int,
    limit: int | None = None,
    plain: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """Non-overlapping evaluation windows of one text source, all documents joined. (window, length)

    plain, tell: see `documents`. Text shorter than a window gives one shorter window of at least two tokens.
    """
    ids: list[int] = []
    for text in documents([path], tokenizer, plain, tell):
        ids.extend(token_ids(text, tokenizer))
        if limit is not None and len(ids) >= limit:
            ids = ids[:limit]
            break
    if len(ids) < 2:
        raise UsageError(f"{path} holds {len(ids)} tokens; at least 2 are needed to measure perplexity.")
    length = min(length, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)
