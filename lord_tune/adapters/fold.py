"""Merging: fold adapters of any mode back into L and R, exactly, for a while (`merge`) or for good (`fold`).

PEFT's own merge rounds; see attach.py.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integrations.transformers_quantizer import realised_plan
from ..layers import FactoredLinear, Parts, QuantizedLinear, dense_factor, factored_layers, plain_model
from ..protocols import CausalModel
from .route import Route, active_of, adapters_of, around_host, base_of, linear_of, start_parts, wrappers_of

Model = TypeVar("Model", PreTrainedModel, PeftModel)


@torch.no_grad()
def merge(model: Model) -> Model:
    """Compute with L and R that have the active adapter in them, until `unmerge`; exact, the ranks are unchanged.

    The adapter stays beside them, so saving it, disabling it and switching to another one work as before; what is not
    seen any more is a change of its parameters. Costs the memory of the factors that `fold` would write.
    """
    layers = {name: layer for name, layer in factored_layers(plain_model(model)).items() if active_of(layer)}
    if not layers:
        raise UsageError("The model has no active adapter, so nothing can be merged; load or enable one.")
    for name, layer in layers.items():
        names = active_of(layer)
        route = layer.route if isinstance(layer.route, Route) else Route()
        layer.route = dataclasses.replace(route, merged=_parts_with(name, layer, names), names=names)
    return model


def unmerge(model: Model) -> Model:
    """Compute with the adapter itself again, which `merge` has left as it was."""
    for layer in factored_layers(plain_model(model)).values():
        if isinstance(layer.route, Route):
            layer.route = dataclasses.replace(layer.route, merged=None, names=()) if layer.route.start else None
    return model


@torch.no_grad()
def fold(model: CausalModel, adapter_name: str | None = None) -> PreTrainedModel:
    """Fold an adapter (default: the active one) back into L and R and return the plain factored model, exactly.

    factors, split: the trained parameters become `left` and `right` again. lora: L + dL and R + dR. scales: into the
    one of L and R whose storage that changes least; components apart, both. What a fold changes becomes float32, if it
    was stored in fewer bits (decoded first, so the update is not rounded away).
    """
    base = plain_model(model)
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
        top: tuple[nn.Linear, nn.Linear] | tuple[None, None] = (None, None)
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


def _folded_pair(left: nn.Module, right: nn.Module, adapters: tuple[str, ...]) -> tuple[nn.Linear, nn.Linear]:
    if isinstance(left, IA3Layer) or isinstance(right, IA3Layer):
        return _scaled_pair(left, right, adapters)
    return _with_lora(left, adapters), _with_lora(right, adapters)


def _with_lora(wrapped: nn.Module, adapters: tuple[str, ...]) -> nn.Linear:
    """A factor plus scaling * B A."""
    base = base_of(wrapped)
    if not isinstance(wrapped, LoraLayer) or not any(n in wrapped.lora_A for n in adapters):
        return base
    value = dense_factor(base)
    for n in adapters:
        if n in wrapped.lora_A:
            b, a = (matrices[n].get_parameter("weight") for matrices in (wrapped.lora_B, wrapped.lora_A))
            value = value + wrapped.scaling[n] * (b.double() @ a.double())
    return linear_of(value.float())


def _scaled_pair(
    wrapped_left: nn.Module, wrapped_right: nn.Module, adapters: tuple[str, ...]
) -> tuple[nn.Linear, nn.Linear]:
    """D_out L D and R, or D_out L and D R: D goes where something changes anyway, or else into the smaller of what is
    not packed."""
    outputs, components = _scales_of(wrapped_left, adapters), _scales_of(wrapped_right, adapters)
    left, right = base_of(wrapped_left), base_of(wrapped_right)
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


def _scales_of(wrapped: nn.Module, adapters: tuple[str, ...]) -> Tensor | None:
    """The product of the adapters' scales, float64, (out,)."""
    present = [wrapped.ia3_l[n] for n in adapters if isinstance(wrapped, IA3Layer) and n in wrapped.ia3_l]
    return torch.stack([scales.double().flatten() for scales in present]).prod(0) if present else None
