"""A dense checkpoint written part by part, and read again block by block: no copy of the model beside the model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.blocks import find_blocks
from ..integrations.checkpoint import Checkpoint
from ..integrations.models import load_dense_or_factored
from ..integrations.shards import save_streamed, stored_tensors
from ..integrations.space import bytes_in, free_bytes
from ..integrations.transformers_quantizer import detach
from ..layers import (
    QuantizedEmbedding,
    QuantizedHead,
    dense_tables,
    densify,
    expert_of,
    factored_layers,
    fuse,
    unfused_parameters,
)
from ..layers.sizes import sizes
from ..memory import give_back, settle
from ..protocols import Tokenizer
from .verify import COMPARED_ROWS, PROBE_TOKENS, outputs_of


def dense_skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model of a factored one, on the meta device; ties are as in the model."""
    memo = {id(tensor): _emptied(tensor) for _, _, tensor in _places(model)}
    skeleton = copy.deepcopy(model, memo)
    densify(skeleton, dtype)
    dense_tables(skeleton, dtype)
    detach(skeleton)
    skeleton.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    skeleton.config.dtype = dtype
    return skeleton


@torch.no_grad()
def save_dense(
    model: PreTrainedModel,  # factored; left without values
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype,
    **options: int | str,  # of save_streamed
) -> None:
    """The dense checkpoint in `folder`, one tensor of the model after the other, each let go once it is written."""
    skeleton = dense_skeleton(model, dtype)
    parts = _Parts(model, dtype)
    save_streamed(skeleton, folder, parts.read, parts.let_go, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    to_nothing(model)


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
    parts, outside = _parts_to_run(skeleton, [*state])
    unit = max((sum(state.get(name, 0) for name in names) for _, names in parts), default=0)
    reading = sum(state[name] for name in outside) + unit + largest
    return max(stored + decoded + 2 * largest, reading) + compared


class _Parts:
    """The tensors of the dense model of a factored one, made when they are asked for."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self._model, self._dtype = model, dtype
        self._layers = dict.fromkeys(factored_layers(model))
        self._experts: dict[str, list[str]] = {name: [] for name in unfused_parameters(model)}
        for name in self._layers:
            if (part := expert_of(name)) is not None:
                self._experts[part[0]].append(name)
        held: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for tensors, leaf, tensor in _places(model):
            held.setdefault(id(tensor), []).append((tensors, leaf))
        self._tied = {key: places for key, places in held.items() if len(places) > 1}

    def read(self, name: str) -> Tensor:
        """The tensor of the dense model that has this runtime name."""
        path, _, leaf = name.rpartition(".")
        experts = name.removesuffix("_bias")  # which take up those of the experts' layers
        if experts in self._experts:
            densify(self._model, self._dtype, self._experts[experts])
            fuse(self._model, [experts])
            del self._experts[experts]
        elif path in self._layers:
            densify(self._model, self._dtype, [path])
            del self._layers[path]
        module = self._model.get_submodule(path)
        if isinstance(module, QuantizedEmbedding | QuantizedHead) and leaf == "weight":
            return module.table.whole(self._dtype)
        return _tensors_with(module, leaf)[leaf]

    def let_go(self, names: Iterable[str]) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            tensors = _tensors_with(self._model.get_submodule(path), leaf)
            if leaf in tensors:  # and no stored table
                empty = _emptied(tensors[leaf])
                for owner, key in self._tied.get(id(tensors[leaf]), [(tensors, leaf)]):
                    owner[key] = empty
        give_back()


def _places(model: nn.Module) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((tensors, leaf, tensor) for leaf, tensor in list(tensors.items()) if tensor is not None)


def _tensors_with(module: nn.Module, leaf: str) -> dict[str, Any]:
    """Of the parameters and the buffers of a module those that have this name."""
    return module._parameters if module._parameters.get(leaf) is not None else module._buffers


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def to_nothing(model: nn.Module) -> None:
    """Let go of everything that a model holds, whoever still refers to the model."""
    for tensors, leaf, tensor in _places(model):
        tensors[leaf] = _emptied(tensor)
    settle()


def outputs_by_blocks(folder: Path, ids: Tensor, check: Callable[[PreTrainedModel], None]) -> Tensor:
    """`outputs_of` the dense model in a folder, of which only the parts outside the blocks and the block that runs are
    in memory. check: shown the model, maybe without values, before it runs.

    A model whose code computes with the weights of a block elsewhere is loaded whole, and so is one whose experts
    transformers would write to disk again (it cuts them out of the file's tensors) where there is no room for that.
    """
    free = free_bytes(folder)
    if free is None or free > 1.1 * bytes_in(folder):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lord_tune_read_") as scratch:
            source = Checkpoint(str(folder), None, Path(scratch))
            check(source.model)
            try:
                return _walked(source, ids)
            except RuntimeError as error:  # NotImplementedError is one
                if "meta" not in str(error):  # torch's words for computing with a tensor that has no values
                    raise
            finally:
                to_nothing(source.model)
    model = load_dense_or_factored(str(folder))
    check(model)
    return outputs_of(model, ids)


def _walked(source: Checkpoint, ids: Tensor) -> Tensor:
    """The outputs, with the weights of a block, or of the output head, in memory while it runs."""
    tied = getattr(source.model, "all_tied_weights_keys", None) or {}
    parts, outside = _parts_to_run(source.model, [name for name in source.model.state_dict() if name not in tied])
    source.load(outside)
    with ExitStack() as stack:
        for module, names in parts:
            stack.enter_context(_loaded_while_it_runs(source, module, names))
        return outputs_of(source.model, ids)


def _parts_to_run(model: PreTrainedModel, names: list[str]) -> tuple[list[tuple[nn.Module, list[str]]], list[str]]:
    """Blocks and output head with the tensors that each needs while it runs; the tensors that stay in memory."""
    blocks, tied = find_blocks(model), getattr(model, "all_tied_weights_keys", None) or {}
    inside = () if blocks.whole else tuple(f"{path}." for path in blocks.paths)
    parts: list[tuple[nn.Module, list[str]]] = []
    for prefix, module in zip(inside, blocks.modules, strict=False):
        own = [name for name in names if name.startswith(prefix)]
        elsewhere = {origin for target, origin in tied.items() if target.startswith(prefix)}
        parts.append((module, own + sorted(origin for origin in elsewhere - set(own) if origin.startswith(inside))))
    head = model.get_output_embeddings()
    alone = [] if head is None else _alone(model, head, names, {*tied, *tied.values()})
    if head is not None and alone:
        parts.append((head, alone))
    return parts, [name for name in names if not name.startswith(inside) and name not in alone]


def _alone(model: nn.Module, head: nn.Module, names: list[str], tied: set[str]) -> list[str]:
    """The tensors of the output head, if it shares none."""
    path = next((name for name, module in model.named_modules() if module is head), "")
    own = [name for name in names if name.startswith(f"{path}.")] if path else []
    return [] if any(name in tied for name in own) else own


@contextmanager
def _loaded_while_it_runs(source: Checkpoint, module: nn.Module, names: list[str]) -> Iterator[None]:
    def load(*_: object) -> None:
        source.load(names)

    def release(*_: object) -> None:
        source.release(names)
        give_back()

    handles = [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
