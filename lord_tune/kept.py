"""Tensors that are made when something computes with them; their shape, dtype and device are known before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import UsageError

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_meta", "is_cpu", "is_cuda")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device")
_METADATA: frozenset[Any] = frozenset(
    [*(getattr(Tensor, name).__get__ for name in _PROPERTIES), *(getattr(Tensor, name) for name in _METHODS)]
)
_STATE = (Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.grad.__get__, Tensor.__hash__)  # type: ignore
LOOKS = _METADATA.union(_STATE)
"""What is asked of a tensor without computing with it."""
_FREEZE = (Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]


class Kept(Tensor):
    """A tensor in a file, read when something computes with it."""

    read: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, read: Callable[[], Tensor]
    ) -> Kept:
        kept: Kept = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        kept.read = read
        return kept

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(Kept, lambda kept: kept.read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Kept, lambda kept: kept.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Standin(Kept):
    """A tensor that other tensors are decoded to, for code that looks at it: whatever computes with it gets the decoded
    values, with their gradients. What is written into it would be lost, and its views too, so that raises UsageError.
    """

    refusal: str  # the sentence for whoever writes

    @staticmethod
    def __new__(  # type: ignore[override]
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor],
        refusal: str,
    ) -> Standin:
        made = Kept.__new__(cls, shape, dtype, device, read)
        assert isinstance(made, Standin)
        made.refusal = refusal
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no random numbers into it
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__set__" or func is Tensor.requires_grad_:
            freezes = func in _FREEZE and False in (*args[1:], *kwargs.values())
            if isinstance(args[0], Standin) and not freezes:
                raise UsageError(args[0].refusal)
        made: list[tuple[str, Tensor, int]] = []

        def read(kept: Kept) -> Tensor:
            tensor = kept.read()
            if isinstance(kept, Standin):
                made.append((kept.refusal, tensor, tensor._version))
            return tensor

        def protected(result: Tensor) -> Tensor:
            for refusal, tensor, _ in made:
                if _same_memory(result, tensor):
                    return Standin(result.shape, result.dtype, result.device, lambda: result, refusal)
            return result

        args, kwargs = tree_map_only(Kept, read, (args, kwargs))
        result = func(*args, **kwargs)
        for refusal, tensor, version in made:
            if tensor._version != version:
                raise UsageError(refusal)
        return tree_map_only(Tensor, protected, result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for standin in tree_leaves(value) if written else ():
                if isinstance(standin, Standin):
                    raise UsageError(standin.refusal)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Kept) or one.is_meta or not one.numel():
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself, read if need be."""
    return tensor.read() if isinstance(tensor, Kept) else tensor
