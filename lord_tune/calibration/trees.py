"""Tensors inside the arguments and outputs of a block: tuples, lists and mappings, nested in any way."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Path: TypeAlias = tuple["str | int", ...]
Container: TypeAlias = "list[object] | MutableMapping[str | int, object]"
Calls: TypeAlias = "list[tuple[tuple[object, ...], dict[str, object]]]"  # positional and keyword arguments of each
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)


def same(first: Calls, second: Calls) -> bool:
    """Whether two passes called their blocks with the same values. Lists and mappings among the arguments are a way
    from one block to another and never the same; nor are objects that this module does not know."""
    seen: set[tuple[int, int]] = set()  # the pairs of tensors that are equal: masks are shared by all blocks
    return len(first) == len(second) and all(
        _same(args, others, seen) and kwargs.keys() == more.keys() and _all_same(kwargs, more, seen)
        for (args, kwargs), (others, more) in zip(first, second, strict=True)
    )


def _all_same(first: dict[str, object], second: dict[str, object], seen: set[tuple[int, int]]) -> bool:
    return all(_same(first[key], second[key], seen) for key in first)


def _same(a: object, b: object, seen: set[tuple[int, int]]) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b or (id(a), id(b)) in seen:
            return True
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or not torch.equal(a, b):
            return False
        seen.add((id(a), id(b)))
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | MutableMapping):
        return False
    if isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
        return type(a) is type(b) and a == b
    return a is b


def containers(tree: object, path: Path = ()) -> Iterator[tuple[Path, Container]]:
    """Every list and mapping in a tree."""
    if isinstance(tree, list | MutableMapping):
        yield path, tree
    for key, value in _entries(tree):
        yield from containers(value, (*path, key))


def _entries(tree: object) -> list[tuple[str | int, object]]:
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    return list(tree.items()) if isinstance(tree, MutableMapping) else []


def at(tree: object, path: Path) -> object:
    """The part of a tree at a path."""
    for key in path:
        tree = dict(_entries(tree))[key]
    return tree


def tensors(tree: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a tree."""
    if isinstance(tree, Tensor):
        yield path, tree
    for key, value in _entries(tree):
        yield from tensors(value, (*path, key))


def mapped(tree: object, change: Callable[[Tensor], Tensor]) -> object:
    """The tree with every tensor changed. Lists and mappings are changed in place: others may hold them too."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        parts: list[Any] = [mapped(value, change) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        tree[:] = [mapped(value, change) for value in tree]
    elif isinstance(tree, MutableMapping):
        for key in list(tree):
            tree[key] = mapped(tree[key], change)
    return tree


def items(box: Any) -> list[tuple[Any, object]]:
    """Of a list or mapping, with their places."""
    return list(enumerate(box)) if isinstance(box, list) else list(box.items())
