"""Checkpoints written tensor by tensor: no copy of the model beside the model, which need not be there itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integrations.shards import save_streamed
from ..integrations.transformers_quantizer import detach
from ..layers import (
    QuantizedEmbedding,
    QuantizedHead,
    container_of,
    dense_tables,
    densify,
    expert_of,
    factored_layers,
    fuse,
    sentinel,
    sentinels_of,
    unfused_parameters,
)
from ..protocols import Tokenizer
from .parts import PRESENT, Parts, Store, emptied, places_in, to_nothing


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device; ties are as in the model."""
    return copy.deepcopy(model, {id(tensor): emptied(tensor) for _, _, tensor in places_in(model)})


def dense_skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model of a factored one, on the meta device; ties are as in the model."""
    skeleton = empty_copy(model)
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
    store: Store = PRESENT,
    **options: int | str,  # of save_streamed
) -> None:
    """The dense checkpoint in `folder`, one tensor of the model after the other, each let go once it is written."""
    skeleton = dense_skeleton(model, dtype)
    parts = _DenseParts(model, dtype, store)
    save_streamed(skeleton, folder, parts.read, parts.let_go, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    to_nothing(model)


@torch.no_grad()
def save_factored(
    model: PreTrainedModel,  # with the manifest in its configuration; left without values
    tokenizer: Tokenizer | None,
    folder: Path,
    store: Store = PRESENT,
    **options: int | str,  # of save_streamed
) -> None:
    """The factored checkpoint in `folder`, in the same way."""
    parts, markers = Parts(model, store), set(sentinels_of(model))

    def let_go(names: Iterable[str]) -> None:
        parts.let_go(name for name in names if name not in markers)

    def read(name: str) -> Tensor:
        return sentinel() if name in markers else parts.read(name)

    save_streamed(empty_copy(model), folder, read, let_go, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    to_nothing(model)


class _DenseParts:
    """The tensors of the dense model of a factored one, made when they are asked for."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, store: Store):
        self._model, self._dtype, self._parts = model, dtype, Parts(model, store)
        self._layers = dict.fromkeys(factored_layers(model))
        self._experts: dict[str, list[str]] = {name: [] for name in unfused_parameters(model)}
        for name in self._layers:
            if (part := expert_of(name)) is not None:
                self._experts[part[0]].append(name)

    def read(self, name: str) -> Tensor:
        """The tensor of the dense model that has this runtime name."""
        path, _, leaf = name.rpartition(".")
        experts = name.removesuffix("_bias")  # which take up those of the experts' layers
        if experts in self._experts:
            self._parts.load(container_of(experts), f"{experts}_bias")
            densify(self._model, self._dtype, self._experts[experts])
            fuse(self._model, [experts])
            del self._experts[experts]
        elif path in self._layers:
            self._parts.load(path)
            densify(self._model, self._dtype, [path])
            del self._layers[path]
        module = self._model.get_submodule(path)
        if isinstance(module, QuantizedEmbedding | QuantizedHead) and leaf == "weight":
            with self._parts.held(f"{path}.table"):
                return module.table.whole(self._dtype)
        return self._parts.read(name)

    def let_go(self, names: Iterable[str]) -> None:
        self._parts.let_go(names)
