"""What `lord-tune evaluate` measures on text: perplexity with its standard error, sizes and speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers.sizes import sizes
from ..memory import PeakMemory
from ..protocols import CausalModel, Tokenizer
from .perplexity import window_losses
from .speed import speed
from .statistics import clustered_mean


def evaluate_model(
    model: CausalModel,
    tokenizer: Tokenizer,
    texts: dict[str, Tensor],  # name -> (window, length); at least one
    context_length: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """The keys of `evaluate --json` that are of text; with several texts those of the top are over all their tokens."""
    model.eval()
    losses: dict[str, tuple[Tensor, Tensor]] = {}
    first = next(iter(texts.values()))[0]
    with PeakMemory(torch.device("cpu")) as resident, PeakMemory(next(model.parameters()).device) as peak:
        for name, windows in texts.items():
            losses[name] = window_losses(model, tokenizer, windows, progress)
        tokens_per_second = speed(model, first)
    per_text = {name: _figures(*found) for name, found in losses.items()}
    sums, counts = (torch.cat(parts) for parts in zip(*losses.values(), strict=True))
    return {
        **_figures(sums, counts),
        "context_length": context_length,
        **sizes(model),
        "tokens_per_second": tokens_per_second,
        "peak_rss_bytes": resident.bytes,  # of this evaluation, the loaded model included
        "peak_memory_bytes": peak.bytes,  # of the accelerator, where there is one
        "texts": per_text,
    }


def _figures(
    sums: Tensor,  # (window,) nats
    counts: Tensor,  # (window,)
) -> dict[str, float | int | None]:
    """Standard errors over windows; that of the perplexity is its derivative times that of the loss."""
    tokens = int(counts.sum())
    loss, error = sum(sums.tolist()) / tokens, clustered_mean(sums, counts).standard_error
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": tokens,
        "windows": len(counts),
        "loss_standard_error": error,
        "perplexity_standard_error": None if error is None else math.exp(loss) * error,
    }
