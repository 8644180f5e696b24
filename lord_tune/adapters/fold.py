"""Merging: fold adapters of any kind back into L and R, exactly, for a while (`merge`) or for good (`fold`).

PEFT's own merge rounds; see attach.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integrations.transformers_quantizer import realised_plan
from ..layers import (
    FactoredLinear,
    FrozenBasis,
    Parts,
    PivotedLinear,
    QuantizedLinear,
    dense_factor,
    factored_layers,
    plain_model,
)
from ..linalg import principal
from ..protocols import CausalModel
from .merging import bias_of_lora, deltas_of, merged_factor, merged_module, trained_module
from .route import (
    Route,
    active_in,
    active_of,
    around,
    base_of,
    linear_of,
    names_in,
    start_of,
    start_parts,
    state_of,
)
from .wrappers import BasisLora, HostLora

Model = TypeVar("Model", PreTrainedModel, PeftModel)
Wrapper = BaseTunerLayer | AuxiliaryTrainingWrapper


@torch.no_grad()
def merge(model: Model) -> Model:
    """Compute with L and R that have the active adapter in them, until `unmerge`; exact.

    The adapter stays beside them, so saving it, disabling it, switching to another one or naming one per row work as
    before; what is not seen any more is a change of its parameters. What adapts a decomposed layer from outside, or a
    dense one, goes on computing beside it. Costs the memory of the factors that `fold` would write.
    """
    layers = {name: layer for name, layer in factored_layers(plain_model(model)).items() if active_of(layer)}
    if not layers:
        raise UsageError(
            "The model has no active adapter in its decomposed layers, so nothing can be merged; enable one."
        )
    merged = {}
    for name, layer in layers.items():
        parts, bias = _parts_with(name, layer, None)
        if bias is not None:
            raise UsageError(f"The adapter of '{name}' has a bias (`lora_bias`), which only fold merges.")
        merged[name] = parts
    for name, layer in layers.items():
        route = layer.route if isinstance(layer.route, Route) else Route()
        layer.route = dataclasses.replace(route, merged=merged[name], state=state_of(layer))
    return model


def unmerge(model: Model) -> Model:
    """Compute with the adapter itself again, which `merge` has left as it was."""
    for layer in factored_layers(plain_model(model)).values():
        if isinstance(layer.route, Route):
            layer.route = dataclasses.replace(layer.route, merged=None, state=()) if layer.route.start else None
    return model


@torch.no_grad()
def fold(model: CausalModel, adapter_name: str | None = None) -> PreTrainedModel:
    """Fold an adapter (default: those that are active) into the model for good and return that, plain and exact.

    factors, split: the trained parameters become `left` and `right` again. lora: L + dL and R + dR. scales: into the
    one of L and R whose storage that changes least; components apart, both. basis: L R of the components that are left
    and the new ones. LoRA around a whole layer or on its Q, and
    sums of several adapters of the first two modes: as further components. Other kinds on L or R, on dense layers and
    embeddings: as PEFT merges them, in float64. What a fold changes becomes float32, if it was stored in fewer bits
    (decoded first, so the update is not rounded away). Modules that were trained as a whole replace their originals.

    UsageError, before anything is touched, for what cannot be folded exactly.
    """
    base = plain_model(model)
    _check_foldable(model, base)
    wrappers = _outermost(base)
    if adapter_name is not None and not any(adapter_name in _held(wrapper) for wrapper in _all_wrappers(base)):
        raise UsageError(f"The model has no adapter '{adapter_name}'; load it, or leave adapter_name out.")
    chosen = None if adapter_name is None else (adapter_name,)
    whole: dict[str, nn.Module] = {}
    factored: dict[str, tuple[FactoredLinear, Parts, Tensor | None]] = {}
    for name, layer in _layers(base, wrappers).items():
        outer = wrappers.get(name)
        parts, bias = _parts_with(name, layer, chosen)
        if isinstance(outer, BaseTunerLayer):
            parts, bias = _with_outer(name, layer, outer, _names(outer, chosen), parts, bias)
        factored[name] = layer, parts, bias
    for name, wrapper in wrappers.items():
        if name not in factored:
            whole[name] = _without_peft(name, wrapper, chosen, base)
    _check_nothing_left(base, [*whole, *factored])
    for name, (layer, parts, bias) in factored.items():
        layer.host = layer.route = None
        layer.left, layer.right, layer.backbone, layer.top_left, layer.top_right = parts
        layer.pivot()
        if bias is not None:
            dtype = layer.dtype if layer.bias is None else torch.float32
            old = 0.0 if layer.bias is None else layer.bias.double()
            layer.bias = nn.Parameter((old + bias).to(dtype), requires_grad=False)
        whole[name] = layer
    for name, module in whole.items():
        base.set_submodule(name, module)
    for layer in factored_layers(base).values():
        layer.plan = realised_plan(layer)
    for key in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(key, None)
    base.requires_grad_(False)
    return base.eval()


def _check_foldable(model: CausalModel, base: PreTrainedModel) -> None:
    configs = getattr(model, "peft_config", None) or getattr(base, "peft_config", None) or {}
    for name, config in configs.items():
        if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
            raise UsageError(f"The adapter '{name}' is {config.peft_type}, which is no part of any layer; unload it.")


def _all_wrappers(base: nn.Module) -> list[Wrapper]:
    return [m for m in base.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _held(wrapper: Wrapper) -> set[str]:
    return names_in(wrapper) if isinstance(wrapper, BaseTunerLayer) else set(wrapper._adapters)


def _names(wrapper: Wrapper, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """The adapters of a wrapper that are to be folded."""
    if chosen is not None:
        return tuple(name for name in chosen if name in _held(wrapper))
    if isinstance(wrapper, BaseTunerLayer):
        return active_in(wrapper)
    return () if wrapper.disable_adapters else tuple(n for n in wrapper.active_adapters if n in wrapper._adapters)


def _outermost(base: nn.Module) -> dict[str, Wrapper]:
    """What PEFT put into the model, by name; what is inside another or inside a decomposed layer left out."""
    found: dict[str, Wrapper] = {}
    inside: list[str] = []
    for name, module in base.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name] = module
            inside.append(f"{name}.")
        elif isinstance(module, FactoredLinear):
            inside.append(f"{name}.")
    return found


def _layers(base: nn.Module, wrappers: dict[str, Wrapper]) -> dict[str, FactoredLinear]:
    """The decomposed layers by the names they have without PEFT; those in modules trained as a whole left out."""
    found: dict[str, FactoredLinear] = {}
    aside = tuple(f"{name}." for name in wrappers)
    for name, module in base.named_modules():
        if isinstance(module, FactoredLinear) and not name.startswith(aside):
            found[name] = module
    for name, wrapper in wrappers.items():
        layer = wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else None
        if isinstance(layer, FactoredLinear):
            found[name] = layer
    return found


def _without_peft(name: str, wrapper: Wrapper, chosen: tuple[str, ...] | None, base: nn.Module) -> nn.Module:
    """What stands in the place of a wrapper that is around no decomposed layer."""
    names = _names(wrapper, chosen)
    original = wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else wrapper.original_module
    if not names:
        return original
    own = {id(p) for p in original.parameters()}
    for other, module in base.named_modules():
        shared = any(id(p) in own for p in module.parameters(recurse=False))
        if shared and other != name and not other.startswith(f"{name}."):
            raise UsageError(
                f"'{name}' has an adapter and shares its weight with '{other}', which a folded model would change too; "
                "load the base with tie_word_embeddings=False."
            )
    if isinstance(wrapper, BaseTunerLayer):
        return merged_module(name, wrapper, names)
    return trained_module(name, wrapper, names)


def _check_nothing_left(base: nn.Module, replaced: list[str]) -> None:
    gone = tuple(f"{name}." for name in replaced)
    for name, module in base.named_modules():
        covered = name in replaced or name.startswith(gone)
        if type(module).__module__.startswith("peft.") and not covered:
            raise UsageError(f"'{name}' is a {type(module).__name__} of PEFT, which cannot be folded; unload it.")


def _parts_with(name: str, layer: FactoredLinear, chosen: tuple[str, ...] | None) -> tuple[Parts, Tensor | None]:
    """The modules of a layer with adapters in them (default: those that are active), and what they add to its bias."""
    if layer.host is not None:
        return _from_host(name, layer, chosen), None
    bias: Tensor | None = None
    found: dict[str, Any] = {}
    for prefix in ("", "top_"):
        left, right = getattr(layer, f"{prefix}left"), getattr(layer, f"{prefix}right")
        if left is None:
            found |= {f"{prefix}left": None, f"{prefix}right": None}
            continue
        pair = _folded_pair(f"{name}.{prefix}left", left, f"{name}.{prefix}right", right, chosen)
        if prefix and pair != (base_of(left), base_of(right)):  # a checkpoint has one format for both
            pair = linear_of(dense_factor(pair[0]).float()), linear_of(dense_factor(pair[1]).float())
        found |= {f"{prefix}left": pair[0], f"{prefix}right": pair[1]}
        if isinstance(left, BaseTunerLayer):
            bias = _sum(bias, bias_of_lora(left, _names(left, chosen)))
    parts = Parts(found["left"], found["right"], layer.backbone, found["top_left"], found["top_right"])
    if isinstance(layer.backbone, BaseTunerLayer):
        wrapper = layer.backbone
        names = _names(wrapper, chosen)
        deltas = deltas_of(f"{name}.backbone", wrapper, names) if names else []
        if deltas is None:
            raise UsageError(f"The backbone of '{name}' has an adapter that is not plain LoRA; unload it.")
        parts = _extended(parts._replace(backbone=base_of(wrapper)), deltas)
        bias = _sum(bias, bias_of_lora(wrapper, names) if names else None)
    return parts, bias


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _from_host(name: str, layer: FactoredLinear, chosen: tuple[str, ...] | None) -> Parts:
    host = layer.host
    names = _names(host, chosen) if isinstance(host, HostLora) else ()
    if isinstance(base_of(host), FrozenBasis):
        return _from_basis(host, names)
    if not names:
        return start_parts(layer)
    base = base_of(host)
    if len(names) == 1 and host.scaling[names[0]] == 1:
        return around(base, host.lora_B[names[0]].weight, host.lora_A[names[0]].weight)
    left, right = (value.double() for value in start_of(host.start, layer.device))
    deltas = deltas_of(name, host, names)
    assert deltas is not None, "refused when the adapter was attached"
    rest = 1 - sum(host.scaling[n] for n in names)
    products = [(rest * left, right)] if rest else []
    products += deltas
    return around(base, torch.cat([b for b, _ in products], 1).float(), torch.cat([a for _, a in products]).float())


def _from_basis(host: BasisLora | FrozenBasis, names: tuple[str, ...]) -> Parts:
    """What is left of the old components and the new ones as singular vectors: of rank left + new, or a full one."""
    base = base_of(host)
    assert isinstance(base, FrozenBasis)
    if not names:
        return Parts(base.left, base.right, base.backbone)
    assert isinstance(host, BasisLora)
    scale = host.scale(names).double()
    kept = scale.nonzero()[:, 0]
    new_left = [host.scaling[name] * host.lora_B[name].get_parameter("weight").double() for name in names]
    new_right = [host.lora_A[name].get_parameter("weight").double() for name in names]
    old = dense_factor(base.left)[:, kept] * scale[kept], dense_factor(base.right)[kept]
    left, right = principal(torch.cat([old[0], *new_left], 1), torch.cat([old[1], *new_right]))
    return Parts(linear_of(left.float()), linear_of(right.float()), base.backbone)


def _with_outer(
    name: str, layer: FactoredLinear, outer: BaseTunerLayer, names: tuple[str, ...], parts: Parts, bias: Tensor | None
) -> tuple[Parts, Tensor | None]:
    """A layer with the adapters around it as further components."""
    deltas = deltas_of(name, outer, names) if names else []
    if deltas is None:
        raise UsageError(f"'{name}' is decomposed, and the adapter around it is no plain LoRA; unload the adapter.")
    return _extended(parts, deltas), _sum(bias, bias_of_lora(outer, names) if names else None)


def _extended(parts: Parts, deltas: list[tuple[Tensor, Tensor]]) -> Parts:
    """With products B A added to L R."""
    if not deltas:
        return parts
    assert isinstance(parts.left, nn.Linear) and isinstance(parts.right, nn.Linear)
    left = torch.cat([dense_factor(parts.left), *(b for b, _ in deltas)], 1)
    right = torch.cat([dense_factor(parts.right), *(a for _, a in deltas)])
    return parts._replace(left=linear_of(left.float()), right=linear_of(right.float()))


def _folded_pair(
    left_name: str, left: nn.Module, right_name: str, right: nn.Module, chosen: tuple[str, ...] | None
) -> tuple[nn.Linear, nn.Linear]:
    if any(isinstance(side, IA3Layer) for side in (left, right)) and not any(
        getattr(side, "is_feedforward", False) for side in (left, right)
    ):
        return _scaled_pair(left, right, chosen)
    return _with_adapters(left_name, left, chosen), _with_adapters(right_name, right, chosen)


def _with_adapters(name: str, wrapped: nn.Module, chosen: tuple[str, ...] | None) -> nn.Linear:
    """A factor with the adapters on it."""
    base = base_of(wrapped)
    names = _names(wrapped, chosen) if isinstance(wrapped, BaseTunerLayer) else ()
    if not names or not isinstance(wrapped, BaseTunerLayer):
        return base
    deltas = deltas_of(name, wrapped, names)
    if deltas is None:
        return merged_factor(name, wrapped, names)
    if name.endswith("right") and bias_of_lora(wrapped, names) is not None:
        raise UsageError(f"'{name}' has an adapter with a bias (`lora_bias`), for which R has no place; unload it.")
    return linear_of((dense_factor(base) + sum(b @ a for b, a in deltas)).float())


def _scaled_pair(
    wrapped_left: nn.Module, wrapped_right: nn.Module, chosen: tuple[str, ...] | None
) -> tuple[nn.Linear, nn.Linear]:
    """D_out L D and R, or D_out L and D R: D goes where something changes anyway, or else into the smaller of what is
    not packed."""
    outputs, components = _scales_of(wrapped_left, chosen), _scales_of(wrapped_right, chosen)
    left, right = base_of(wrapped_left), base_of(wrapped_right)
    if outputs is None and components is None:
        return left, right
    dense = [factor for factor in (right, left) if not _is_packed(factor)] or [right, left]
    into_left = outputs is not None or min(dense, key=lambda f: f.in_features * f.out_features) is left
    if components is not None and not into_left:
        right = linear_of((components[:, None] * dense_factor(right)).float())
    if into_left:
        value = dense_factor(left)
        value = value if components is None else value * components
        value = value if outputs is None else outputs[:, None] * value
        left = linear_of(value.float())
    return left, right


def _is_packed(factor: nn.Linear) -> bool:
    return isinstance(factor.rest if isinstance(factor, PivotedLinear) else factor, QuantizedLinear)


def _scales_of(wrapped: nn.Module, chosen: tuple[str, ...] | None) -> Tensor | None:
    """The product of the adapters' scales, float64, (out,)."""
    if not isinstance(wrapped, IA3Layer):
        return None
    present = [wrapped.ia3_l[name].double().flatten() for name in _names(wrapped, chosen)]
    return torch.stack(present).prod(0) if present else None
