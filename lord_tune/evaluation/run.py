"""What `lord-tune evaluate` measures on one model: perplexity, sizes and speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers.sizes import sizes
from ..memory import PeakMemory
from ..protocols import CausalModel, Tokenizer
from .perplexity import perplexity
from .speed import speed


def evaluate_model(
    model: CausalModel,
    tokenizer: Tokenizer,
    texts: dict[str, Tensor],  # name -> (window, length)
    context_length: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """The keys of `evaluate --json`; with several texts the top-level loss is over all their tokens."""
    model.eval()
    per_text: dict[str, dict[str, Any]] = {}
    first = next(iter(texts.values()))[0]
    with PeakMemory(torch.device("cpu")) as resident, PeakMemory(next(model.parameters()).device) as peak:
        for name, windows in texts.items():
            loss, tokens = perplexity(model, tokenizer, windows, progress)
            per_text[name] = {"perplexity": math.exp(loss), "loss": loss, "tokens": tokens}
        tokens_per_second = speed(model, first)
    tokens = sum(entry["tokens"] for entry in per_text.values())
    loss = sum(entry["loss"] * entry["tokens"] for entry in per_text.values()) / tokens
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": tokens,
        "context_length": context_length,
        **sizes(model),
        "tokens_per_second": tokens_per_second,
        "peak_rss_bytes": resident.bytes,  # of this evaluation, the loaded model included
        "peak_memory_bytes": peak.bytes,  # of the accelerator, where there is one
        "texts": per_text,
    }
