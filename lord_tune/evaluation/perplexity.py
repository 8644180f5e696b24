"""Perplexity: non-overlapping windows of `context_length` tokens, each predicting its tokens 2..n, float32 logits.

A model with a masked-token head is measured on a fixed random 15 % of the tokens, masked; the number is then exp(loss
per masked token) and not comparable with a causal model's. An encoder-decoder reads a window and predicts it again.
What is measured is compared once with the loss that the model itself computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import LordError, UsageError
from ..integrations.running import check_loss, kind_of, summed_loss
from ..protocols import CausalModel, Tokenizer


def perplexity(
    model: CausalModel,
    tokenizer: Tokenizer,
    windows: Tensor,  # (window, length)
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[float, int]:
    """(mean loss in nats per predicted token, predicted tokens)."""
    sums, counts = window_losses(model, tokenizer, windows, progress)
    total, count = sum(sums.tolist()), int(counts.sum())
    return total / count, count


def window_losses(
    model: CausalModel,
    tokenizer: Tokenizer,
    windows: Tensor,  # (window, length)
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Tensor, Tensor]:
    """(summed loss in nats, predicted tokens) of each window, (window,) each, float64 and int64."""
    if kind_of(model) == "bare":
        raise UsageError(
            f"{type(model).__name__} has no language-model head, so it has no perplexity; its per-layer errors are in "
            "decomposition.json (`lord-tune inspect`)."
        )
    mask_token = getattr(tokenizer, "mask_token_id", None)
    check_loss(model, windows[:1], mask_token)
    sums, counts = [], []
    with torch.no_grad():
        for index, window in enumerate(windows):
            loss, tokens = summed_loss(model, window[None], mask_token)
            sums.append(float(loss))
            counts.append(tokens)
            progress("measuring perplexity", index + 1, len(windows))
    if not math.isfinite(sum(sums)):
        raise LordError("The loss is NaN or Inf; the weights are broken or the dtype is too narrow (`dtype` float32).")
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts)
