"""What `lord-tune evaluate` measures on one model: perplexity, sizes and speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..layers.sizes import sizes
from ..memory import peak_bytes, peak_rss_bytes
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
    for name, windows in texts.items():
        loss, tokens = perplexity(model, tokenizer, windows, progress)
        per_text[name] = {"perplexity": math.exp(loss), "loss": loss, "tokens": tokens}
    tokens = sum(entry["tokens"] for entry in per_text.values())
    loss = sum(entry["loss"] * entry["tokens"] for entry in per_text.values()) / tokens
    first = next(iter(texts.values()))[0]
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": tokens,
        "context_length": context_length,
        **sizes(model),
        "tokens_per_second": speed(model, first),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_memory_bytes": peak_bytes(next(model.parameters()).device),  # of the accelerator, where there is one
        "texts": per_text,
    }
