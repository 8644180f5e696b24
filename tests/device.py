"""A stand-in for an accelerator: its tensors hold CPU data, say that they are on another device, and do not mix.

Inside `with StandIn() as device:` everything that names `device.device` gets tensors of class `OnDevice`. Operations on
them run on the CPU tensors they hold, so values are real, autograd too. What a CUDA tensor refuses is refused: another
tensor from the CPU beside one from the device, unless it is 0-dimensional or an index, and a random generator of
the CPU. What makes a GPU wait is counted: copies in either direction, and values that the host looks at.

The device is "lazy:0", a name that every build of torch knows and that has no kernels; backward passes for it run in
the caller's thread. It has no streams, no random state and no memory of its own: torch.accelerator says PEAK bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("lazy", 0)
PEAK = 12345678  # bytes: what is said of its memory
TO_DEVICE, TO_HOST, WAIT = "copy to the device", "copy to the host", "synchronisation"

_aten = torch.ops.aten
_LOOKS = {  # the size or the course of what follows depends on values
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "histc", "allclose",
    "_linalg_check_errors", "linalg_eigh", "linalg_cholesky",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"copy_", "_to_copy"}
_where: list[tuple[str, str]] = []  # (what, operation), in order


class OnDevice(torch.Tensor):
    """A tensor of the stand-in device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    # what torch answers in C++ from a memory that this tensor has not

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {DEVICE}"

    def __deepcopy__(self, memory: dict[int, Any]) -> OnDevice:
        copy = OnDevice(self.held.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OnDevice) and value.shape == self.shape and value.dtype == self.dtype
        self.held = value.held


def _unwrap(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return torch.device("cpu")
    return value.held if isinstance(value, OnDevice) else value


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = operation.overloadpacket.__name__
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    inside = [t for t in tensors if isinstance(t, OnDevice)]
    wanted = kwargs.get("device")
    onto = bool(inside) if wanted is None else torch.device(wanted).type == DEVICE.type
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    if not inside and not onto:
        return args[0].clone() if name == "_pin_memory" else operation(*args, **kwargs)
    _check(operation, name, args, kwargs, tensors, inside, onto)
    originals = {id(t.held): t for t in inside}
    result = operation(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if name == "_to_copy" and inside and not onto:
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        original = originals.get(id(value))
        if original is None:
            return OnDevice(value) if onto else value
        assert original.shape == value.shape and original.stride() == value.stride(), f"{operation} changes in place"
        return original

    if name == "copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    return tree_map(wrap, result)


def _check(
    operation: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], inside: list[Any], onto: bool
) -> None:
    """Raise what CUDA would, and count what it would wait for."""
    outside = [t for t in tensors if not isinstance(t, OnDevice)]
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != DEVICE.type:
        raise RuntimeError(f"{operation}: Expected a '{DEVICE}' device type for generator but found 'cpu'")
    if name in _COPIES:
        if name == "copy_":
            from_device, to_device = isinstance(args[1], OnDevice), isinstance(args[0], OnDevice)
        else:
            from_device, to_device = bool(inside), onto
        if from_device != to_device:
            _note(TO_DEVICE if to_device else TO_HOST, operation)
        return
    if name in _INDEXED:
        target, indices, *rest = args
        flags = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if flags:
            _note(WAIT, operation)
        for index in indices:
            if isinstance(target, OnDevice) and index is not None and not isinstance(index, OnDevice):
                _note(TO_DEVICE, operation)
        outside = [t for t in (target, *rest) if isinstance(t, Tensor) and not isinstance(t, OnDevice) and t.dim()]
    elif name not in ("cat", "stack"):
        outside = [t for t in outside if t.dim()]
    if outside:
        raise RuntimeError(f"{operation}: Expected all tensors to be on the same device, but found at least two, "
                           f"cpu and {DEVICE}")  # fmt: skip
    if name in _LOOKS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _note(WAIT, operation)


def _note(what: str, operation: Any) -> None:
    _where.append((what, str(operation)))


class StandIn(TorchDispatchMode):
    """The device is there while the `with` block runs; factories and `to` know it."""

    device = DEVICE

    def __enter__(self) -> StandIn:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) builds on the CPU and copies
        asked = torch.is_autocast_enabled
        self._patches = contextlib.ExitStack()
        # what torch has for every real device: random state (gradient checkpointing), autocast (trl's loss)
        self._patches.enter_context(mock.patch.object(torch, "lazy", SimpleNamespace(_initialized=False), create=True))
        without = lambda kind=None: asked() if kind is None else kind != DEVICE.type and asked(kind)  # noqa: E731
        self._patches.enter_context(mock.patch.object(torch, "is_autocast_enabled", without))
        self._patches.enter_context(mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(DEVICE)))
        accelerator = mock.patch.multiple(
            torch.accelerator,
            is_available=lambda: True,
            current_accelerator=lambda check_available=False: torch.device(DEVICE.type),
            synchronize=lambda device=None: _note(WAIT, "synchronize"),
            reset_peak_memory_stats=lambda device=None: None,
            max_memory_allocated=lambda device=None: PEAK,
            memory_allocated=lambda device=None: PEAK,
        )
        self._patches.enter_context(accelerator)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, str]]]:
        """(what, operation) of everything inside the `with` block that a GPU or its host would wait for."""
        start = len(_where)
        seen: list[tuple[str, str]] = []
        try:
            yield seen
        finally:
            seen.extend(_where[start:])
