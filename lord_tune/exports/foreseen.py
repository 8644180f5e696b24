"""The memory of an export before any weight is read."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..integrations.shards import stored_tensors
from ..layers import factored_layers
from ..layers.sizes import sizes
from .by_blocks import parts_to_run
from .streamed import dense_skeleton
from .verify import COMPARED_ROWS, PROBE_TOKENS


def foreseen_bytes(model: PreTrainedModel, dtype: torch.dtype | None) -> int:
    """An upper bound of what a dense export in `dtype`, or a factored one (None), holds beside the process itself.
    model: on the meta device.

    Writing: the model as it is stored; the largest layer being multiplied out in float64, three times its numbers; the
    largest tensor, twice for experts that become one. Reading a dense one again: what stands outside the blocks, the
    largest of block and head, and a tensor as it comes from the file. Both: the outputs of source and copy.
    """
    layers = factored_layers(model).values()
    decoded = 24 * max((layer.plan.shape[0] * layer.plan.shape[1] for layer in layers), default=0)
    stored, head = int(sizes(model)["model_bytes"]), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    width = 0 if weight is None else int(weight.shape[0])
    compared = width * (PROBE_TOKENS * 3 * 4 + COMPARED_ROWS * 6 * 8)
    skeleton = dense_skeleton(model, dtype or model.dtype)
    state = {name: tensor.numel() * tensor.itemsize for name, tensor in stored_tensors(skeleton).items()}
    largest = max(state.values(), default=0)
    if dtype is None:
        return stored + decoded + largest + compared
    parts, outside = parts_to_run(skeleton, [*state])
    unit = max((sum(state.get(name, 0) for name in names) for _, names in parts), default=0)
    reading = sum(state[name] for name in outside) + unit + largest
    return max(stored + decoded + 2 * largest, reading) + compared
