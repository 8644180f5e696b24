"""What an adapted layer computes with: its own modules, a merged adapter, or the factors it started from."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import CastLinear, FactoredLinear, FrozenSum, Parts, ZeroLinear
from ..linalg import principal
from .stored_tensors import StoredPivot, StoredTensor, value_of

Start: TypeAlias = tuple[StoredTensor | Tensor, StoredTensor | Tensor] | StoredPivot  # L, R that a host started from
State: TypeAlias = tuple[tuple[str, tuple[float, ...]], ...]  # active adapter, its scaling in each wrapper of a layer


@dataclasses.dataclass(frozen=True)
class Route:
    """Which modules a layer computes with, if not its own: those of a merged adapter, or, where its host was unloaded,
    the factors it started from.

    Modules here are not children of the layer, so they are neither saved nor moved with it.
    """

    start: Start | None = None  # of a layer with a host
    rank: int = 0  # of these
    merged: Parts | None = None
    state: State = ()  # of the adapters in `merged`

    def __call__(self, layer: FactoredLinear) -> Parts | None:
        # another adapter, another scale, or one adapter per row: these compute as if nothing were merged
        if self.merged is not None and state_of(layer) == self.state and not _names_rows(layer):
            if layer.training and torch.is_grad_enabled():
                raise UsageError("The adapter is merged, so it cannot train; call lord_tune.unmerge first.")
            return self.merged
        unloaded = layer.host is not None and not isinstance(layer.host, BaseTunerLayer)
        return start_parts(layer) if unloaded else None


def wrappers_of(layer: FactoredLinear) -> list[BaseTunerLayer]:
    return [child for child in layer.children() if isinstance(child, BaseTunerLayer)]


def names_in(wrapper: BaseTunerLayer) -> set[str]:
    """The adapters that a layer of PEFT holds."""
    found: set[str] = set()
    for attribute in wrapper.adapter_layer_names:
        held = getattr(wrapper, attribute, None)
        found |= set(held.keys()) if isinstance(held, nn.ModuleDict | nn.ParameterDict) else set()
    return found


def active_in(wrapper: BaseTunerLayer) -> tuple[str, ...]:
    """The adapters that a layer of PEFT computes with now."""
    held = () if wrapper.disable_adapters else names_in(wrapper)
    return tuple(name for name in wrapper.active_adapters if name in held)


def active_of(layer: FactoredLinear) -> tuple[str, ...]:
    """The adapters that change a layer from inside now."""
    return tuple(dict.fromkeys(name for wrapper in wrappers_of(layer) for name in active_in(wrapper)))


def state_of(layer: FactoredLinear) -> State:
    wrappers = wrappers_of(layer)
    scalings = [getattr(wrapper, "scaling", {}) for wrapper in wrappers]
    return tuple((name, tuple(s[name] for s in scalings if name in s)) for name in active_of(layer))


def _names_rows(layer: FactoredLinear) -> bool:
    """Whether this forward pass was given `adapter_names`, which PEFT hands to its layers by hooks."""
    wrappers = (child for child in layer.children() if isinstance(child, BaseTunerLayer))
    hooks = (hook for wrapper in wrappers for hook in wrapper._forward_pre_hooks.values())
    return any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in hooks)


def linear_of(value: Tensor) -> CastLinear:
    module = CastLinear(value.shape[1], value.shape[0], value.dtype, device="meta")
    module.weight = nn.Parameter(value.detach(), requires_grad=False)
    return module


def base_of(module: nn.Module | BaseTunerLayer) -> nn.Linear:
    """A factor or a host, without PEFT's layer around it."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    assert isinstance(base, nn.Linear)
    return base


def around(base: nn.Linear, left: Tensor, right: Tensor) -> Parts:
    """What a host stands on, with these factors."""
    pair = (linear_of(left), linear_of(right))
    if isinstance(base, FrozenSum):
        return Parts(base.left, base.right, base.backbone, *pair)
    return Parts(*pair, None if isinstance(base, ZeroLinear) else base)


def start_of(start: Start, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, R) as the decomposed model has them."""
    left, right = start.pair() if isinstance(start, StoredPivot) else (value_of(kept) for kept in start)
    return left.to(device), right.to(device)


def trained_start(start: Start, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, R) float32 that a further adapter starts with: the same product."""
    left, right = start_of(start, device)
    if isinstance(start, StoredPivot):  # whose components are far from orthogonal
        left, right = principal(left, right)
    return left.to(torch.float32, copy=True), right.to(torch.float32, copy=True)


def start_parts(layer: FactoredLinear) -> Parts:
    assert isinstance(layer.route, Route) and layer.route.start is not None
    return around(base_of(layer.host), *start_of(layer.route.start, layer.weight.device))
