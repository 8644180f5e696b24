"""Merging: fold adapters of any mode back into L and R, exactly, for a while (`merge`) or for good (`fold`).

PEFT's own merge rounds; see attach.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..errors import UsageError
from ..integrations.transformers_quantizer import realised_plan
from ..layers import FactoredLinear, Parts, QuantizedLinear, dense_factor, factored_layers
from .attach import plain_of
from .route import Route, active_of, adapters_of, around_host, base_of, linear_of, start_parts, wrappers_of


@torch.no_grad()
def merge(model: Any) -> Any:
    """Compute with L and R that have the active adapter in them, until `unmerge`; exact, the ranks are unchanged.

    The adapter stays beside them, so saving it, disabling it and switching to another one work as before; what is not
    seen any more is a change of its parameters. Costs the memory of the factors that `fold` would write.
    """
    layers = {name: layer for name, layer in factored_layers(plain_of(model)).items() if active_of(layer)}
    if not layers:
        raise UsageError("The model has no active adapter, so nothing can be merged; load or enable one.")
    for name, layer in layers.items():
        names = active_of(layer)
        route = layer.route if isinstance(layer.route, Route) else Route()
        layer.route = dataclasses.replace(route, merged=_parts_with(name, layer, names), names=names)
    return model


def unmerge(model: Any) -> Any:
    """Compute with the adapter itself again, which `merge` has left as it was."""
    for layer in factored_layers(plain_of(model)).values():
        if isinstance(layer.route, Route):
            layer.route = dataclasses.replace(layer.route, merged=None, names=()) if layer.route.start else None
    return model


@torch.no_grad()
def fold(model: Any, adapter_name: str | None = None) -> Any:
    """Fold an adapter (default: the active one) back into L and R and return the plain factored model, exactly.

    factors, split: the trained parameters become `left` and `right` again. lora: L + dL and R + dR. scales: into the
    one of L and R whose storage that changes least; components apart, both. What a fold changes becomes float32, if it
    was stored in fewer bits (decoded first, so the update is not rounded away).
    """
    base = plain_of(model)
    layers = factored_layers(base)
    if adapter_name is not None and not any(
        adapter_name in adapters_of(w) for y in layers.values() for w in wrappers_of(y)
    ):
        raise UsageError(f"The model has no adapter '{adapter_name}'; load it, or leave adapter_name out.")
    for name, layer in layers.items():
        parts = _parts_with(name, layer, active_of(layer) if adapter_name is None else (adapter_name,))
        layer.host = layer.route = None
        layer.left, layer.right, layer.backbone, layer.top_left, layer.top_right = parts
        layer.plan = realised_plan(layer)
    for key in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(key, None)
    base.requires_grad_(False)
    return base.eval()


def _parts_with(name: str, layer: FactoredLinear, adapters: tuple[str, ...]) -> Parts:
    """The modules of a layer with these adapters folded in."""
    if layer.host is None:
        pair = _folded_pair(layer.left, layer.right, adapters)
        top: tuple[Any, Any] = (None, None)
        if layer.top_left is not None:
            old = base_of(layer.top_left), base_of(layer.top_right)
            top = _folded_pair(layer.top_left, layer.top_right, adapters)
            if top != old:  # a checkpoint has one format for both
                top = linear_of(dense_factor(top[0]).float()), linear_of(dense_factor(top[1]).float())
        return Parts(*pair, layer.backbone, *top)
    host = layer.host
    present = [n for n in adapters if isinstance(host, LoraLayer) and n in host.lora_A]
    if len(present) > 1:
        raise UsageError(f"'{name}' has {len(present)} adapters active, each of which is all of L R; set one of them.")
    if not present:
        return start_parts(layer)
    return around_host(layer, host.lora_B[present[0]].weight, host.lora_A[present[0]].weight)


def _folded_pair(left: Any, right: Any, adapters: tuple[str, ...]) -> tuple[Any, Any]:
    if isinstance(left, IA3Layer) or isinstance(right, IA3Layer):
        return _scaled_pair(left, right, adapters)
    return _with_lora(left, adapters), _with_lora(right, adapters)


def _with_lora(wrapped: Any, adapters: tuple[str, ...]) -> Any:
    """A factor plus scaling * B A."""
    present = [n for n in adapters if isinstance(wrapped, LoraLayer) and n in wrapped.lora_A]
    if not present:
        return base_of(wrapped)
    value = dense_factor(base_of(wrapped))
    for n in present:
        value = value + wrapped.scaling[n] * (wrapped.lora_B[n].weight.double() @ wrapped.lora_A[n].weight.double())
    return linear_of(value.float())


def _scaled_pair(left: Any, right: Any, adapters: tuple[str, ...]) -> tuple[Any, Any]:
    """D_out L D and R, or D_out L and D R: D goes where something changes anyway, or else into the smaller of what is
    not packed."""
    outputs, components = _scales_of(left, adapters), _scales_of(right, adapters)
    left, right = base_of(left), base_of(right)
    if outputs is None and components is None:
        return left, right
    dense = [factor for factor in (right, left) if not isinstance(factor, QuantizedLinear)] or [right, left]
    into_left = outputs is not None or min(dense, key=lambda f: f.in_features * f.out_features) is left
    if components is not None and not into_left:
        right = linear_of((components[:, None] * dense_factor(right)).float())
    if into_left:
        value = dense_factor(left)
        value = value if components is None else value * components
        value = value if outputs is None else outputs[:, None] * value
        left = linear_of(value.float())
    return left, right


def _scales_of(wrapped: Any, adapters: tuple[str, ...]) -> Tensor | None:
    """The product of the adapters' scales, float64, (out,)."""
    present = [wrapped.ia3_l[n] for n in adapters if isinstance(wrapped, IA3Layer) and n in wrapped.ia3_l]
    return torch.stack([scales.double().flatten() for scales in present]).prod(0) if present else None
