"""Export as an ordinary Hugging Face checkpoint, W = Q + L R per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..integrations.models import load_dense_or_factored, save_model
from ..integrations.transformers_quantizer import detach
from ..layers import densify, expert_of, factored_layers
from .verify import outputs_of


def write_dense(factored: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    biased = [name for name, layer in factored_layers(factored).items() if layer.bias is not None]
    expected = {name for name in biased if expert_of(name) is None}  # densify looks after those of experts
    densify(factored, dtype)
    detach(factored)
    factored.to(dtype)
    factored.config.dtype = dtype
    save_model(factored, tokenizer, folder)
    reloaded = load_dense_or_factored(str(folder))
    for name in expected:
        if getattr(reloaded.get_submodule(name), "bias", None) is None:
            raise UsageError(
                f"'{name}' carries a bias (method afm) and {type(reloaded).__name__} has no place for one, so a dense "
                "checkpoint would lose it; export --format factored, or decompose with --method whitened."
            )
    return outputs_of(reloaded, ids)
