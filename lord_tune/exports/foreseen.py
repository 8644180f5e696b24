"""The memory of an export before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integrations.shards import stored_tensors
from ..layers import factored_layers, stored_tables, unfused_parameters
from ..quantizers.base import TILE
from .by_blocks import parts_to_run
from .streamed import dense_skeleton
from .verify import COMPARED_ROWS, PROBE_TOKENS


def foreseen_bytes(model: PreTrainedModel, form: str, dtype: torch.dtype | None = None, adapted: bool = False) -> int:
    """An upper bound of what an export in this form holds beside the process itself. model: on the meta device, one
    that can be walked block by block; dtype: of what is written, by default the model's own; adapted: whether an
    adapter of L and R is folded. What a stock loader or an engine holds in a process of its own comes on top.

    Running the source, and what was written where that is read here: what stands outside the blocks, the largest of
    block and head, the largest tensor as it comes from the file (three times from a GGUF file, where it is decoded),
    and what a product takes. Writing: a layer multiplied out in float64, three times its numbers; the largest tensor,
    twice, and for experts that become one both; an embedding that is decoded. All: the outputs of source and copy. With
    an adapter, L and R in float32, twice.
    """
    dtype, layers = dtype or model.dtype, factored_layers(model).values()
    numbers = max((layer.plan.shape[0] * layer.plan.shape[1] for layer in layers), default=0)
    widest = max((sum(layer.plan.shape) for layer in layers), default=0)
    pairs = [layer.rank * sum(layer.plan.shape) for layer in layers]
    stored = _bytes_of({name: t for name, t in model.state_dict().items() if name not in _tied(model)})
    running = _running(model, stored) + 12 * min(numbers, TILE) + 16 * PROBE_TOKENS * widest
    tables = max((shape[0] * shape[1] for shape in (t.shape for t in stored_tables(model).values())), default=0)
    decoded = (24 + dtype.itemsize) * max([numbers * (form not in ("factored", "vllm")), *pairs])
    written = _bytes_of(stored_tensors(dense_skeleton(model, dtype))) if form == "dense" else stored
    largest = 2 * max(written.values(), default=0)
    writing = decoded + largest if unfused_parameters(model) else max(decoded, largest)
    writing = max(writing, (4 + dtype.itemsize) * tables * (form != "factored"))
    if form in ("dense", "gguf"):
        skeleton = dense_skeleton(model, dtype if form == "dense" else torch.float32)
        running = max(running, _running(skeleton, _bytes_of(stored_tensors(skeleton)), 3 if form == "gguf" else 1))
    head = getattr(model.get_output_embeddings(), "weight", None)
    compared = 0 if head is None else int(head.shape[0]) * (PROBE_TOKENS * 3 * 4 + COMPARED_ROWS * 6 * 8)
    return max(running, writing) + compared + 8 * sum(pairs) * adapted


def _tied(model: PreTrainedModel) -> Mapping[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}


def _running(model: PreTrainedModel, state: Mapping[str, int], copies: int = 1) -> int:
    """Of a model that is read block by block, without what its products take. state: bytes by name; copies: of a tensor
    that is being read."""
    parts, outside = parts_to_run(model, [*state])
    unit = max((sum(state.get(name, 0) for name in names) for _, names in parts), default=0)
    return sum(state[name] for name in outside) + unit + copies * max(state.values(), default=0)
