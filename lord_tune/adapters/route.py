"""What an adapted layer computes with: its own modules, a merged adapter, or the factors it started from."""

from __future__ import annotations

import dataclasses

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import CastLinear, FactoredLinear, FrozenSum, Parts, ZeroLinear
from .stored_tensors import StoredTensor, value_of


@dataclasses.dataclass(frozen=True)
class Route:
    """Which modules a layer computes with, if not its own: those of a merged adapter, or the factors it started from.

    Modules here are not children of the layer, so they are neither saved nor moved with it.
    """

    start: tuple[StoredTensor | Tensor, StoredTensor | Tensor] | None = None  # (L, R) of a layer with a host
    rank: int = 0  # of these
    merged: Parts | None = None
    names: tuple[str, ...] = ()  # the adapters in `merged`

    def __call__(self, layer: FactoredLinear) -> Parts | None:
        names = active_of(layer)
        if self.merged is not None and names == self.names:  # another adapter computes as if nothing were merged
            if layer.training and torch.is_grad_enabled():
                raise UsageError("The adapter is merged, so it cannot train; call lord_tune.unmerge first.")
            return self.merged
        return start_parts(layer) if layer.host is not None and not names else None


def wrappers_of(layer: FactoredLinear) -> list[BaseTunerLayer]:
    return [child for child in layer.children() if isinstance(child, BaseTunerLayer)]


def adapters_of(wrapper: BaseTunerLayer) -> nn.ModuleDict | nn.ParameterDict:
    """The adapters of a LoRA or IA3 layer, by name."""
    found: nn.ModuleDict | nn.ParameterDict = getattr(wrapper, wrapper.adapter_layer_names[0])
    return found


def active_of(layer: FactoredLinear) -> tuple[str, ...]:
    """The adapters that change this layer now."""
    wrappers = [wrapper for wrapper in wrappers_of(layer) if not wrapper.disable_adapters]
    return tuple(dict.fromkeys(n for wrapper in wrappers for n in wrapper.active_adapters if n in adapters_of(wrapper)))


def linear_of(value: Tensor) -> CastLinear:
    module = CastLinear(value.shape[1], value.shape[0], value.dtype, device="meta")
    module.weight = nn.Parameter(value.detach(), requires_grad=False)
    return module


def base_of(module: nn.Module) -> nn.Linear:
    """A factor or a host, without PEFT's layer around it."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    assert isinstance(base, nn.Linear)
    return base


def around_host(layer: FactoredLinear, left: Tensor, right: Tensor) -> Parts:
    """A layer with a host whose trainable factors are these."""
    base, pair = base_of(layer.host), (linear_of(left), linear_of(right))
    if isinstance(base, FrozenSum):
        return Parts(base.left, base.right, base.backbone, *pair)
    return Parts(*pair, None if isinstance(base, ZeroLinear) else base)


def start_parts(layer: FactoredLinear) -> Parts:
    assert isinstance(layer.route, Route) and layer.route.start is not None
    left, right = (value_of(kept).to(layer.weight.device) for kept in layer.route.start)
    return around_host(layer, left, right)
