"""A checkpoint opened without loading it: a skeleton on the meta device whose tensors are read one block at a time.

transformers builds the skeleton and accelerate's disk offload the index (`device_map={"": "disk"}`): every renaming and
conversion between stored and runtime names is theirs, so no family needs code here. Tensors that transformers converts
on loading (experts stored one by one, fused at run time) are written converted to `scratch`, once. Of experts that are
layers of their own (layers/experts.py) each is read alone, out of the fused tensor. The forward hooks that would load
weights at every call are removed again: `load` and `release` say when. `StoredModel` is one that is decomposed already,
or not, and may get an adapter.
"""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UsageError
from ..layers import expert_of
from ..memory import READ_AT_ONCE
from ..plans import LayerPlan
from ..protocols import Tokenizer
from ..storage import write_json
from .models import default_device, load_dense_or_factored, model_class
from .remote_code import add_remote_code
from .transformers_quantizer import lord_config

_FLOATS = ("F64", "F32", "F16", "BF16")


class Entry(TypedDict, total=False):
    """Where accelerate's index has a tensor."""

    safetensors_file: str
    weight_name: str  # in the file; absent: its own
    dtype: str


def skeleton(name: str, dtype: str | None = None) -> PreTrainedModel:
    """The model's structure on the meta device, from config.json alone; dtype as in load_dense_or_factored."""
    build, config = model_class(name)
    _check_plain(name, config)
    wanted = getattr(torch, dtype) if dtype else (getattr(config, "dtype", None) or torch.float32)
    with torch.device("meta"):
        make = getattr(build, "_from_config", None) or build.from_config
        return make(config, dtype=wanted, attn_implementation="eager").eval()  # whose operations can be counted


def _check_plain(name: str, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "lord":
        raise UsageError(f"{name} is decomposed already; start from the original dense model.")
    raise UsageError(f"{name} is quantized ({method}); start from the original dense model.")


class Checkpoint:
    """The lazily opened checkpoint (decomposition.Source)."""

    def __init__(
        self,
        name: str,
        dtype: str | None,
        scratch: Path,
        device: torch.device | None = None,
        factored: bool = False,  # whether it may be decomposed already
    ):
        _, config = model_class(name)
        if not factored:
            _check_plain(name, config)
        self._device, self._recast = device or default_device(), dtype is not None
        scratch.mkdir(parents=True, exist_ok=True)
        self.model = load_dense_or_factored(name, dtype, device_map={"": "disk"}, offload_folder=str(scratch))
        self._weights = _index_of(self.model)
        self._present = set(self._weights)  # asking the mapping itself reads the tensor
        _check_headers(name, self.model, getattr(self._weights, "index", {}))
        self._tied: dict[str, list[str]] = {}
        for target, origin in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            self._tied.setdefault(origin, []).append(target)
        self._computed = self._compute_unstored()
        remove_hook_from_submodules(self.model)
        Checkpoint.release(self, self._computed)  # heirs keep where tensors hang, which is known below
        self.model.__dict__.pop("hf_device_map", None)
        self.model.requires_grad_(False)
        for name, buffer in self.model.named_buffers():  # those that no checkpoint stores (rotary frequencies)
            if not buffer.is_meta:
                _put(self.model, name, buffer.to(self._device))

    def _compute_unstored(self) -> dict[str, Tensor]:
        """Parameters that no checkpoint stores because the model's code computes them (sinusoidal positions), which
        offloading drops; left in the model. CheckpointError for one whose values the code draws at random."""
        stored = self._present | {tied for name, all_tied in self._tied.items() for tied in (name, *all_tied)}
        names = [name for name, p in self.model.named_parameters() if p.is_meta and name not in stored]
        found: list[dict[str, Tensor]] = []
        for _ in range(2):
            for name in names:
                parameter = self.model.get_parameter(name)
                _put(self.model, name, torch.full_like(parameter, float("nan"), device="cpu"))
            for owner in {name.rpartition(".")[0] for name in names}:
                self.model._init_weights(self.model.get_submodule(owner))
            found.append({name: self.model.get_parameter(name).detach() for name in names})
        for name in names:
            if not torch.equal(found[0][name], found[1][name]):
                raise CheckpointError(f"The checkpoint lacks the tensor '{name}'; download or write it again.")
        return found[1]

    def load(self, names: Iterable[str]) -> None:
        """Fill parameters and persistent buffers; tied ones follow. Each gets memory of its own, never a map of the
        file, whose pages would count against the peak of the process as long as any tensor of the file lives."""
        for name in names:
            _put(self.model, name, self._copied(name))
            for target in self._tied.get(name, ()):
                _tie(self.model, target, name)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            owner = _owner(self.model, name)
            if owner is None:  # the layer was replaced
                continue
            _put(self.model, name, getattr(owner, name.rpartition(".")[2]).detach().to("meta"))
            for target in self._tied.get(name, ()):
                _tie(self.model, target, name)

    def stored(self, name: str) -> Tensor | None:
        part = expert_of(name)
        entry = self._entry(name if part is None else part[0])
        if self._recast or "safetensors_file" not in entry:
            return None
        if part is not None:
            return _stored_expert(entry, *part)
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            return file.get_tensor(entry.get("weight_name", name))

    def _copied(self, name: str) -> Tensor:
        """Of a large table a few rows at a time: the pages of a file stay mapped while it is open."""
        entry = self._entry(name)
        if name in self._computed or name not in self._present or "safetensors_file" not in entry:
            return self._read(name).to(self._device, copy=True)
        file, stored = entry["safetensors_file"], entry.get("weight_name", name)
        dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else None
        with safe_open(file, framework="pt") as opened:
            shape = opened.get_slice(stored).get_shape()
            if len(shape) != 2 or math.prod(shape) <= READ_AT_ONCE:
                return opened.get_tensor(stored).to(self._device, dtype, copy=True)
        found, step = None, max(1, READ_AT_ONCE // shape[1])
        for start in range(0, shape[0], step):
            with safe_open(file, framework="pt") as opened:
                rows = opened.get_slice(stored)[start : start + step]
                if found is None:
                    found = torch.empty(shape, dtype=dtype or rows.dtype, device=self._device)
                found[start : start + step] = rows
            del rows
        assert found is not None
        return found

    def _entry(self, name: str) -> Entry:
        index: Mapping[str, Entry] = getattr(self._weights, "index", {})
        return index.get(name, {})

    def _read_expert(self, fused: str, expert: int) -> Tensor:
        """One expert's part, without reading the others where the file is safetensors."""
        entry = self._entry(fused)
        if "safetensors_file" in entry:
            part = _stored_expert(entry, fused, expert)
            return part.to(getattr(torch, entry["dtype"])) if "dtype" in entry else part
        return self._weights[fused][expert]

    def _read(self, name: str) -> Tensor:
        if name in self._computed:
            return self._computed[name]
        part = expert_of(name)
        if part is not None and part[0] in self._present:
            return self._read_expert(*part)
        source = next((n for n in (name, *self._tied.get(name, ())) if n in self._present), None)
        if source is None:
            raise CheckpointError(f"The checkpoint lacks the tensor '{name}'; download or write it again.")
        return self._weights[source]


class StoredModel(Checkpoint):
    """A checkpoint, dense or factored, whose tensors are loaded into the modules that held them when it was opened,
    wherever an adapter has put these. What is loaded already stays as it is; modules that are gone are passed over."""

    def __init__(self, name: str, scratch: Path):
        super().__init__(name, None, scratch, factored=True)
        for module in self.model.modules():  # accelerate left a bound method: a circle, which keeps what is replaced
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.forward
        for origin, targets in self._tied.items():
            for target in targets:
                _tie(self.model, target, origin)
        tied = {target for targets in self._tied.values() for target in targets}
        self._holders = {
            name: (weakref.ref(owner), name.rpartition(".")[2])
            for name in self.model.state_dict()
            if name not in tied and (owner := _owner(self.model, name)) is not None
        }
        self._readers = {
            target: (weakref.ref(owner), target.rpartition(".")[2])
            for targets in self._tied.values()
            for target in targets
            if (owner := _owner(self.model, target)) is not None
        }

    def names(self) -> list[str]:
        """The tensors of the model as it was opened, one of those that are tied."""
        return list(self._holders)

    def awaits(self, name: str) -> bool:
        """Whether the tensor has no values now."""
        return any(tensors_with(module, leaf)[leaf].is_meta for _, module, leaf in self._held([name]))

    def load(self, names: Iterable[str]) -> None:
        for name, module, leaf in self._held(names):
            if tensors_with(module, leaf)[leaf].is_meta:
                self._fill(name, module, leaf, self._copied(name))

    def release(self, names: Iterable[str]) -> None:
        for name, module, leaf in self._held(names):
            self._fill(name, module, leaf, tensors_with(module, leaf)[leaf].detach().to("meta"))

    def holds(self, name: str) -> bool:
        """Whether `load` brings the tensor that the model has under this name now."""
        owner = _owner(self.model, name)
        return any(module is owner for _, module, _ in self._held([name]))

    def _held(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Module, str]]:
        for name in names:
            reference, leaf = self._holders.get(name, (None, ""))
            module = None if reference is None else reference()
            if module is not None and leaf in tensors_with(module, leaf):
                yield name, module, leaf

    def _fill(self, name: str, module: nn.Module, leaf: str, tensor: Tensor) -> None:
        _set(module, leaf, tensor)
        for target in self._tied.get(name, ()):
            reference, key = self._readers.get(target, (None, ""))
            reader = None if reference is None else reference()
            if reader is not None and reader is not module:
                reader._parameters[key] = module._parameters[leaf]


def tensors_with(module: nn.Module, leaf: str) -> dict[str, Any]:
    """Of the parameters and the buffers of a module those that have this name."""
    return module._parameters if module._parameters.get(leaf) is not None else module._buffers


def _stored_expert(entry: Entry, fused: str, expert: int) -> Tensor:
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        return file.get_slice(entry.get("weight_name", fused))[expert]


def _index_of(model: nn.Module) -> Any:
    """accelerate's mapping from tensor names to tensors on disk, found in the hooks of a disk-offloaded model."""
    for module in model.modules():
        mapping = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if mapping is not None:
            while hasattr(mapping, "dataset"):
                mapping = mapping.dataset
            return mapping
    raise CheckpointError("The checkpoint holds no tensors; download or write it again.")


def _check_headers(name: str, model: nn.Module, index: Mapping[str, Entry]) -> None:
    """CheckpointError if a stored tensor has another shape than the model's, or integers where numbers are wanted:
    nothing else compares the two when tensors are read one by one."""
    files: dict[str, list[tuple[str, str]]] = {}
    for key, entry in index.items():
        if entry.get("safetensors_file"):
            files.setdefault(entry["safetensors_file"], []).append((key, entry.get("weight_name", key)))
    expected = model.state_dict()
    for path, keys in files.items():
        with safe_open(path, framework="pt") as file:
            for key, stored_name in keys:
                stored, wanted = file.get_slice(stored_name), expected[key]
                if tuple(stored.get_shape()) != tuple(wanted.shape):
                    raise CheckpointError(
                        f"The model '{name}' could not be loaded: '{stored_name}' is {tuple(stored.get_shape())} in "
                        f"{path}, and config.json expects {tuple(wanted.shape)}; the two do not belong together."
                    )
                if wanted.is_floating_point() and stored.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"The model '{name}' could not be loaded: '{stored_name}' holds {stored.get_dtype()} in "
                        f"{path}; expected floating-point weights. Start from the original dense model."
                    )


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if leaf in module._parameters or leaf in module._buffers else None


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, leaf = _owner(model, name), name.rpartition(".")[2]
    assert module is not None
    _set(module, leaf, tensor)


def _set(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))  # which packed layers overwrite
    else:
        module._buffers[leaf] = tensor


def _tie(model: nn.Module, target: str, origin: str) -> None:
    source, module = _owner(model, origin), _owner(model, target)
    if source is not None and module is not None:
        module._parameters[target.rpartition(".")[2]] = source._parameters[origin.rpartition(".")[2]]


def write_index(
    folder: Path,
    model: PreTrainedModel,  # the skeleton, with the decomposed layers in place
    tokenizer: Tokenizer | None,
    plans: dict[str, LayerPlan],
    weight_map: dict[str, str],  # tensor -> shard
) -> None:
    """What this package writes of a factored checkpoint beside its shards: config with the manifest, index, tokenizer,
    generation config."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    manifest = {name: plan.to_dict() for name, plan in plans.items()}
    config.quantization_config = lord_config(model, manifest)
    add_remote_code(config, folder)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    size = 0
    for shard in sorted(set(weight_map.values())):
        with (folder / shard).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        size += sum(e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n != "__metadata__")
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
