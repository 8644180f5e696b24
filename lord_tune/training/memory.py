"""What a training step holds, by part: counted on real tensors, and foreseen from shapes.

    weights      frozen tensors as they are stored: dense, packed codes and scales, copies decoded once, buffers
    adapters     what PEFT added or moved to its layers, trained or not
    gradients    one per trained number
    optimizer    its state after the first step
    activations  what the forward pass keeps for the backward pass, each storage once, weights not counted
    logits       what is as wide as the vocabulary (or a piece of it, see Live), at most at once

The peak is weights + adapters + optimizer + the most that forward, backward and update hold beside them: activations,
and what passes: gradients of activations, decoded tiles, logits in pieces. Activations are not all alive any more when
the last gradients come, so the parts may sum to more than the peak.
"""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from ..memory import PeakMemory, give_back
from .pieces import piece_width

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments


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


def _attached(owner: object) -> Iterator[Tensor]:
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


def _is_parameter(value: object) -> bool:
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


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Of the state alone, which most optimizers make in their first step."""
    blocks, total = Storages(), 0
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    pending: list[object] = list(inner.state.values())
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
    """Counts what forward passes inside the `with` block keep for their backward passes, `.activations`; of it as wide
    as the vocabulary and not among them: `.logits`."""

    def __init__(self, model: nn.Module, known: Storages):
        self._widths = logit_widths(vocabulary_of(model))
        self._known, self._seen = known, Storages()
        self.activations = self.logits = 0

    def __enter__(self) -> Saved:
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor not in self._known:
            size = self._seen.add(tensor)
            if tensor.dim() > 1 and tensor.shape[-1] in self._widths:
                self.logits += size
            else:
                self.activations += size
        return tensor


class Live(TorchDispatchMode):
    """Counts what operations inside the `with` block allocate and what is freed: at most `.peak` bytes together, of it
    `.logits` as wide as the vocabulary or as a piece of it in which the loss is computed."""

    def __init__(self, model: nn.Module, known: Storages):
        super().__init__()
        self._known, self._alive = known, set[int]()
        self._widths = logit_widths(vocabulary_of(model))
        self._now = self._logits_now = 0
        self.peak = self.logits = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor) -> None:
        if tensor in self._known:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        wide = tensor.dim() > 1 and tensor.shape[-1] in self._widths
        self._add(size, wide)
        weakref.finalize(storage, self._free, key, size, wide)

    def _add(self, size: int, wide: bool) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)
        if wide:
            self._logits_now += size
            self.logits = max(self.logits, self._logits_now)

    def _free(self, key: int, size: int, wide: bool) -> None:
        self._alive.discard(key)
        self._add(-size, wide)


def logit_widths(vocabulary: int) -> set[int]:
    """Widths of whole logits, and of the pieces in which trl computes them; the last piece is narrower."""
    return {vocabulary, piece_width()} if vocabulary else set()


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the output head; 0 without one."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return 0 if head is None else int(getattr(head, "out_features", None) or head.weight.shape[0])


class FirstStep(TrainerCallback):
    """Counts the first batch of the first optimiser step that a trainer makes, by part, and on a CPU gives freed memory
    back after every step; the rest runs as if it were not there. Sharded models are not looked into, and their logits
    not counted; of compiled ones not even what they keep, since a hook would break their graphs."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._saved: Saved | None = None
        self._live: Live | None = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if model is not None and not self.parts:
            weights, adapters, known = held(model)
            self.parts = {"weights": weights, "adapters": adapters}
            if args.torch_compile:
                return
            if not (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
                self._live = Live(model, known)
                self._live.__enter__()
            self._saved = Saved(model, known).__enter__()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self.close()
        if model is not None and "gradients" not in self.parts:
            self.parts["gradients"] = gradient_bytes(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        if optimizer is not None and "optimizer" not in self.parts:
            self.parts["optimizer"] = optimizer_bytes(optimizer)
        if args.device.type == "cpu":  # pieces that the C library keeps: 71 MiB of a step of SmolLM2-135M on 512 tokens
            give_back()

    def close(self) -> None:
        """After the first batch's backward pass, or where training broke off in it."""
        if self._saved is not None:
            self._saved.__exit__()
            self.parts["activations"], self._saved = self._saved.activations, None
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.parts["logits"], self._live = self._live.logits, None


class TrainingPeak:
    """The most a `with` block holds, `.bytes`: of an accelerator's memory what torch allocated there; on a CPU resident
    memory of the process above `held`, what Python and the libraries had before the model was loaded."""

    def __init__(self, held: int, device: torch.device):
        self._held = held if device.type == "cpu" else 0
        self._peak = PeakMemory(device)

    def __enter__(self) -> TrainingPeak:
        self._peak.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._peak.__exit__(*error)
        self.bytes = max(0, self._peak.bytes - self._held)


def _plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


def account(
    model: nn.Module,  # any PEFT model, ready to train
    batch: Mapping[str, Tensor],  # what the model's forward takes, labels included
    optimizer: Optimizer,  # over the trained parameters
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = _plain_loss,  # e.g. a trainer's compute_loss
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
    precision = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    with _Allocated(device) as step, Live(model, known) as live:
        with Saved(model, known) as saved, precision:
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
        live.logits,
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

    def __exit__(self, *error: object) -> None:
        if self._profile is None:
            self.peak = torch.accelerator.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        total = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                self.peak = max(self.peak, total)
