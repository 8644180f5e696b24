"""Tokens per second of a model.

`speed` is one number; `speeds` tells reading a prompt (prefill) from generating (decode), with the key-value cache, for
one prompt and for several at once. Each is the median of three runs after one that warms up.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import UsageError
from ..integrations.running import kind_of, max_length, run_model
from ..layers import plain_model
from ..memory import PeakMemory, synchronize
from ..protocols import CausalModel

if TYPE_CHECKING:
    from transformers import GenerationMixin

_GENERATED = 16  # tokens per timed generation
_REPEATS = 3
PROMPT = 128  # tokens that `speeds` reads before it generates


def speed(model: CausalModel, window: Tensor) -> float:
    """Tokens per second: greedy generation at batch 1 after a short prompt (causal), else scored tokens.

    Median of three runs after one warm-up.
    """
    window = window[None].to(next(model.parameters()).device)
    times = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            synchronize(window.device)
            start = time.perf_counter()
            if kind_of(model) == "causal":
                prompt = window[:, :16]
                options = {"do_sample": False, "max_new_tokens": _GENERATED, "min_new_tokens": _GENERATED}
                generate = cast("GenerationMixin", model).generate
                generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
                done = _GENERATED
            else:
                run_model(model, window)
                done = window.shape[1]
            synchronize(window.device)
            times.append((time.perf_counter() - start) / done)
    return 1 / statistics.median(times[1:])


def speeds(
    model: CausalModel,
    batch_sizes: list[int],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Prefill and decode tokens per second, summed over the prompts of a batch, and peak memory; see the top.

    The prompts are random tokens: what is said does not change the time. Memory is that of the process on a CPU, the
    loaded model included, and what torch allocated on an accelerator.
    """
    if kind_of(model) != "causal":
        raise UsageError(f"{type(plain_model(model)).__name__} does not continue text, so `speed` has nothing to time.")
    prompt = min(PROMPT, max_length(model) - _GENERATED - 1)
    device = next(model.parameters()).device
    vocabulary = cast(Tensor, plain_model(model).get_input_embeddings().weight).shape[0]
    found: dict[str, dict[str, float]] = {}
    for index, size in enumerate(batch_sizes):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (size, prompt), generator=generator).to(device)
        with PeakMemory(device) as peak:
            times = [_generation_times(model, ids) for _ in range(_REPEATS + 1)][1:]
        prefill, decode = (statistics.median(seconds) for seconds in zip(*times, strict=True))
        found[str(size)] = {
            "prefill_tokens_per_second": size * prompt / prefill,
            "decode_tokens_per_second": size * _GENERATED / decode,
            "peak_memory_bytes": peak.bytes,
        }
        progress("measuring speed", index + 1, len(batch_sizes))
    return {"prompt_tokens": prompt, "generated_tokens": _GENERATED, "batches": found}


@torch.no_grad()
def _generation_times(
    model: CausalModel,
    ids: Tensor,  # (batch, prompt)
) -> tuple[float, float]:
    """(seconds to read the prompts, seconds to generate after them), greedily."""
    accepted = inspect.signature(type(plain_model(model)).forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    held = "cache" if "cache" in accepted else "past_key_values"  # which is its older name
    synchronize(ids.device)
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, **last_only)
    synchronize(ids.device)
    read = time.perf_counter()
    cache = getattr(output, held, None)
    if cache is None:
        name = type(plain_model(model)).__name__
        raise UsageError(f"{name} keeps no key-value cache, so `speed` cannot tell reading from generating.")
    for _ in range(_GENERATED):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **{held: cache})
        cache = getattr(output, held)
    synchronize(ids.device)
    return read - start, time.perf_counter() - read
