"""What a checkpoint holds under the keys of weights that are decomposed.

A sentinel of shape (1,) stands under the key of each such weight, of an embedding stored in low precision, and of each
fused parameter whose experts are layers of their own. Without it, transformers without lord_tune would load the
checkpoint as a model with random weights and only log a line; with it, it raises. Sentinels are in files alone: a model
in memory answers with the weight, and its `state_dict` has nothing but what it computes with (accelerate expects a
shard under every key of an FSDP2 model). One number rather than none: empty tensors have no memory, by which
safetensors and accelerate take them all for one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import unfused_parameters
from .factored_linear import FactoredLinear
from .quantized_embedding import QuantizedEmbedding, QuantizedHead


def sentinel() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")


def sentinels_of(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the model holds beside its `state_dict`."""
    layers = []
    for name, module in model.named_modules():
        table = isinstance(module, QuantizedEmbedding | QuantizedHead) and module.root
        if table or isinstance(module, FactoredLinear):
            layers.append(f"{name}.weight")
    return {key: sentinel() for key in (*layers, *unfused_parameters(model))}
