"""What the model of written GGUF files computes, as the gguf package decodes them, a block at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integrations.models import default_device
from ..layers import FactoredLinear
from ..memory import give_back
from .base import Job
from .by_blocks import walked, without_values
from .gguf_places import Place, decoded, let_go_pages
from .parts import Parts
from .streamed import dense_skeleton
from .verify import outputs_of

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


def decoded_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model in float32, without values but for what no file holds (rotary frequencies)."""
    skeleton = dense_skeleton(model, torch.float32)
    stored, values = {*skeleton.state_dict()}, dict(model.named_buffers())
    parts = Parts(skeleton)
    for name, buffer in list(skeleton.named_buffers()):
        if name not in stored:
            parts.put(name, values[name].to(default_device(), buffer.dtype))
    return skeleton


@torch.no_grad()
def outputs_of_files(
    skeleton: PreTrainedModel,  # of decoded_skeleton
    layers: dict[str, FactoredLinear],
    places: dict[str, Place],  # name in the model -> place in the file
    job: Job,
) -> Tensor:
    """`outputs_of` the model in `job.folder`; loaded whole where its code computes with a block's weights elsewhere."""
    store = _Files(skeleton, layers, places, job.folder)
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    names = [name for name in skeleton.state_dict() if name not in tied]
    try:
        return walked(skeleton, store, names, job.ids)
    except RuntimeError as error:
        if not without_values(error):
            raise
    store.load(names)
    return outputs_of(skeleton, job.ids)


class _Files:
    """The written files as a `Store`."""

    def __init__(
        self, skeleton: PreTrainedModel, layers: dict[str, FactoredLinear], places: dict[str, Place], folder: Path
    ):
        self._parts, self._places = Parts(skeleton), places
        self._empty = {name for name, tensor in skeleton.state_dict().items() if tensor.is_meta}
        self._turned = {f"{name}.weight" for name, layer in layers.items() if layer.plan.conv1d}
        files = [folder / MODEL_FILE, *([folder / ADAPTER_FILE] if (folder / ADAPTER_FILE).is_file() else [])]
        self._files = [_opened(file) for file in files]
        self._tensors = {str(tensor.name): tensor for file in self._files for tensor in file.tensors}

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._empty:
                self._parts.put(name, self._read(name).to(default_device()))
                self._empty.discard(name)
                for file in self._files:
                    let_go_pages(file)
                give_back()

    def release(self, names: Iterable[str]) -> None:
        names = list(names)
        self._parts.let_go(names)
        self._empty.update(names)

    def _read(self, name: str) -> Tensor:
        import gguf

        place = self._places[name]
        value = decoded(gguf, self._tensors[place.name])
        right = self._tensors.get(f"{place.name}.lora_a")
        if right is not None:
            value = value + decoded(gguf, self._tensors[f"{place.name}.lora_b"]) @ decoded(gguf, right)
        value = place.back(value)
        return (value.T if name in self._turned else value).contiguous()


def _opened(file: Path) -> Any:
    import gguf

    return gguf.GGUFReader(file)
