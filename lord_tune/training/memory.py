"""What a training step holds, by part: counted on real tensors, and foreseen from shapes.

    weights      frozen tensors as they are stored: dense, packed codes and scales, copies decoded once, buffers
    adapters     what PEFT added or moved to its layers, trained or not
    gradients    one per trained number
    optimizer    its state after the first step
    activations  what the forward pass keeps for the backward pass, each storage once, weights not counted
    logits       the part of it that is as wide as the vocabulary

The peak is weights + adapters + optimizer + the most that forward, backward and update hold beside them: activations,
and what passes: gradients of activations, decoded tiles, logits in pieces. Activations are not all alive any more when
the last gradients come, so the parts may sum to more than the peak.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Account:
    """Bytes of one training step by part; see the top of this file."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Storages:
    """Distinct memory blocks; tensors that share one count once. None is kept alive."""

    def __init__(self) -> None:
        self._seen: set[StorageWeakRef] = set()  # a weak reference keeps the address from being used again

    def add(self, tensor: Tensor) -> int:
        """Its bytes if they are new, else 0."""
        size = 0
        for part in _plain(tensor):
            storage = part.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._seen:
                self._seen.add(reference)
                size += storage.nbytes()
        return size

    def __contains__(self, tensor: Tensor) -> bool:
        return all(StorageWeakRef(part.untyped_storage()) in self._seen for part in _plain(tensor))


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensor, or this process's shard of a distributed one."""
    local = getattr(tensor, "_local_tensor", None)
    return [tensor] if local is None else [local]


def _attached(owner: Any) -> Iterator[Tensor]:
    """Tensors in plain attributes: decoded copies, bitsandbytes' scales (quant_state, SCB)."""
    for name, value in vars(owner).items():
        if isinstance(value, Tensor):
            yield value
        elif name in ("quant_state", "state2") and value is not None:
            yield from _attached(value)


def _adapter_parameters(model: nn.Module) -> set[int]:
    names = {id(p) for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                found = part.parameters() if isinstance(part, nn.Module) else [part] if _is_parameter(part) else []
                names |= {id(p) for p in found}
    return names


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


def held(model: nn.Module) -> tuple[int, int, Storages]:
    """(bytes of weights, bytes of adapters, their blocks) of any model, PEFT or not."""
    blocks, weights, adapters = Storages(), 0, 0
    of_adapter = _adapter_parameters(model)
    for parameter in model.parameters():
        if id(parameter) in of_adapter:
            adapters += blocks.add(parameter)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *_attached(module)):
            weights += blocks.add(tensor)
            if isinstance(tensor, nn.Parameter):
                weights += sum(blocks.add(extra) for extra in _attached(tensor))
    return weights, adapters, blocks


def gradient_bytes(model: nn.Module) -> int:
    blocks = Storages()
    return sum(blocks.add(p.grad) for p in model.parameters() if p.grad is not None)


def optimizer_bytes(optimizer: Any) -> int:
    """Of the state alone, which most optimizers make in their first step."""
    blocks, total = Storages(), 0
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    pending: list[Any] = list(inner.state.values())
    while pending:
        entry = pending.pop()
        if isinstance(entry, Mapping):
            pending.extend(entry.values())
        elif isinstance(entry, list | tuple):
            pending.extend(entry)
        elif isinstance(entry, Tensor):
            total += blocks.add(entry)
    return total


class Saved:
    """Counts what forward passes inside the `with` block keep for their backward passes: `.activations`, `.logits`."""

    def __init__(self, model: nn.Module, known: Storages):
        self._vocabulary = vocabulary_of(model)
        self._known, self._seen = known, Storages()
        self.activations = self.logits = 0

    def __enter__(self) -> Saved:
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor not in self._known:
            size = self._seen.add(tensor)
            if self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
                self.logits += size
            else:
                self.activations += size
        return tensor


def vocabulary_of(model: Any) -> int:
    """Rows of the output head; 0 without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0 if head is None else int(getattr(head, "out_features", None) or head.weight.shape[0])


def _plain_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss


def account(
    model: Any,  # any PEFT model, ready to train
    batch: Mapping[str, Any],  # what the model's forward takes, labels included
    optimizer: torch.optim.Optimizer,  # over the trained parameters
    loss: Callable[[Any, Mapping[str, Any]], Tensor] = _plain_loss,  # e.g. a trainer's compute_loss
    autocast: torch.dtype | None = None,
) -> Account:
    """Run one training step and count. The step is a real one: the trained parameters change.

    The peak is that of torch's own allocations (its profiler on a CPU, the accelerator's counters elsewhere); neither
    Python nor an allocator's reserve is in it.
    """
    device = next(p for p in model.parameters() if p.requires_grad).device
    model.train()
    model.zero_grad(set_to_none=True)
    gc.collect()
    weights, adapters, known = held(model)
    before = optimizer_bytes(optimizer)
    with _Allocated(device) as step, Saved(model, known) as saved:
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            value = loss(model, batch)
        value.backward()
        del value
    gradients = gradient_bytes(model)
    with _Allocated(device) as update:
        optimizer.step()
    state = optimizer_bytes(optimizer)
    optimizer.zero_grad(set_to_none=True)
    # a later step finds the optimizer's state there already
    beside = max(step.peak, gradients + max(update.peak - (state - before), 0))
    return Account(
        weights,
        adapters,
        gradients,
        state,
        saved.activations,
        saved.logits,
        weights + adapters + state + beside,
    )


class _Allocated:
    """The most that torch allocates inside a `with` block, above what was there: `.peak`, bytes."""

    def __init__(self, device: torch.device):
        self._device, self.peak = device, 0

    def __enter__(self) -> _Allocated:
        self._profile: Any = None
        if self._device.type == "cpu":
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        else:
            torch.accelerator.reset_peak_memory_stats(self._device)
            self._before = torch.accelerator.memory_allocated(self._device)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            self.peak = torch.accelerator.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        total = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                self.peak = max(self.peak, total)
