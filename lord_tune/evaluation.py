"""Perplexity, sizes counted from tensors, and speed.

Perplexity: non-overlapping windows of `context_length` tokens, each predicting its tokens 2..n, float32 logits. A model
with a masked-token head is measured on a fixed random 15 % of the tokens, masked; the number is then exp(loss per
masked token) and not comparable with a causal model's.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calibration.collect import Blocks, find_blocks
from .errors import LordError, LordWarning, UsageError
from .integrations.models import kind_of, summed_loss
from .layers import FactoredLinear, QuantizedLinear, is_linear, weight_of
from .memory import peak_rss_bytes

_GENERATED = 16  # tokens per timed generation
_REPEATS = 3


def perplexity(
    model: Any,
    tokenizer: Any,
    windows: Tensor,  # (window, length)
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[float, int]:
    """(mean loss in nats per predicted token, predicted tokens)."""
    if kind_of(model) == "bare":
        raise UsageError(
            f"{type(model).__name__} has no language-model head, so it has no perplexity; its per-layer errors are in "
            "decomposition.json (`lord-tune inspect`)."
        )
    mask_token = getattr(tokenizer, "mask_token_id", None)
    total, count = 0.0, 0
    with torch.no_grad():
        for index, window in enumerate(windows):
            loss, tokens = summed_loss(model, window[None], mask_token)
            total, count = total + float(loss), count + tokens
            progress("measuring perplexity", index + 1, len(windows))
    if not math.isfinite(total):
        raise LordError("The loss is NaN or Inf; the weights are broken or the dtype is too narrow (--dtype float32).")
    return total / count, count


def sizes(model: Any) -> dict[str, float]:
    """parameters (stored numbers; a packed code counts as one), model_bytes, linear_bits_per_weight.

    Counted from the tensors a checkpoint of the model holds (a skeleton on the meta device will do); tied ones count
    once. The bits are those of the linear layers inside the blocks, decomposed or not, without biases, per weight of
    the dense matrices.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed: dict[str, int] = {}
    for name, module in plain.named_modules():
        if isinstance(module, QuantizedLinear):
            packed[f"{name}.weight"] = module.in_features * module.out_features
    tied = getattr(plain, "all_tied_weights_keys", {}) if any(p.is_meta for p in plain.parameters()) else {}
    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in plain.state_dict().items():
        if tensor.numel() and name not in tied:  # a tensor on the meta device has no address
            tensors[(tensor.data_ptr() or name, tensor.numel())] = name, tensor
    numbers = sum(packed.get(name, t.numel()) for name, t in tensors.values())
    stored = sum(t.numel() * t.element_size() for _, t in tensors.values())
    bits, weights = linear_bits(plain)
    return {
        "parameters": numbers,
        "model_bytes": stored,
        "linear_bits_per_weight": bits / weights if weights else float("nan"),
    }


def linear_bits(model: Any, blocks: Blocks | None = None) -> tuple[int, int]:
    """(stored bits, dense weights) of all linear layers inside the blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # of a model without blocks: it is about calibrating one
        prefixes = (blocks or find_blocks(model)).names()
    inside = {n: m for n, m in model.named_modules() if any(p == "" or n.startswith(p + ".") for p in prefixes)}
    bits = weights = 0
    factored = [name for name, module in inside.items() if isinstance(module, FactoredLinear)]
    for name, module in inside.items():
        if isinstance(module, FactoredLinear):
            stored = [p for key, p in module.named_parameters() if key != "bias"]
            weights += module.in_features * module.out_features
        elif is_linear(module) and not any(name.startswith(f + ".") for f in factored):
            stored = [module.weight]
            weights += weight_of(module).numel()
        else:
            continue
        bits += sum(8 * p.numel() * p.element_size() for p in stored)
    return bits, weights


def speed(model: Any, window: Tensor) -> float:
    """Tokens per second: greedy generation at batch 1 after a short prompt (causal), else scored tokens.

    Median of three runs after one warm-up.
    """
    window = window[None].to(next(model.parameters()).device)
    times = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            if kind_of(model) == "causal":
                prompt = window[:, :16]
                options = {"do_sample": False, "max_new_tokens": _GENERATED, "min_new_tokens": _GENERATED}
                model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
                done = _GENERATED
            else:
                model(input_ids=window)
                done = window.shape[1]
            times.append((time.perf_counter() - start) / done)
    return 1 / statistics.median(times[1:])


def evaluate_model(
    model: Any,
    tokenizer: Any,
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
        "texts": per_text,
    }
