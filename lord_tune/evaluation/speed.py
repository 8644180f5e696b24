"""Tokens per second of a model."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..integrations.running import kind_of, run_model
from ..memory import synchronize
from ..protocols import CausalModel

if TYPE_CHECKING:
    from transformers import GenerationMixin

_GENERATED = 16  # tokens per timed generation
_REPEATS = 3


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
