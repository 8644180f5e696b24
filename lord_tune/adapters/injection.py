"""What happens when PEFT puts an adapter, anybody's, on a model with decomposed layers.

PEFT knows nothing of such layers, and asks nobody: LoRA on `q_proj` stops in its middle, `all-linear` wraps the parts
of a layer one by one, DoRA takes packed codes for a weight. `import lord_tune` therefore puts `injected` around the one
method that all of PEFT's ways lead to (`BaseTuner.inject_adapter`: get_peft_model, from_pretrained, add_adapter,
load_adapter, trl). It translates the targets or refuses in one sentence before the model is touched, and guards the
operations that would be wrong afterwards. A model without decomposed layers is none of its business.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import CheckpointError, UsageError
from ..layers import (
    CastLinear,
    FactoredLinear,
    FrozenBasis,
    FrozenSum,
    PivotedLinear,
    QuantizedLinear,
    ZeroLinear,
    factored_layers,
    unfused_parameters,
)
from .hosts import make_hosts
from .route import Route
from .wrappers import BasisLora, HostLora, LayerLora

# these compute with what the base layer computes, and do not look at its weight
_BLIND = {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "FOURIERFT", "RANDLORA", "VBLORA"}
_BLIND_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_OLD_VARIANTS = ("use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora")
_CHILDREN = 'target_modules=["left", "right"]'


def injected(inject: Callable[..., None], tuner: BaseTuner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`BaseTuner.inject_adapter(model, adapter_name, ...)` with the checks of the top."""
    model = args[0] if args else kwargs["model"]
    adapter_name = args[1] if len(args) > 1 else kwargs["adapter_name"]
    if factored_layers(model):
        make_hosts(tuner, model, tuner.peft_config[adapter_name])
        prepare(tuner, model, tuner.peft_config[adapter_name])
        _guard(tuner)
    inject(*args, **kwargs)
    for layer in factored_layers(model).values():
        if isinstance(layer.host, HostLora) and layer.host.start is None and isinstance(layer.route, Route):
            layer.host.start = layer.route.start
            layer.host.fill(adapter_name)


def prepare(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Translate the targets of a configuration; UsageError for what would not be right."""
    layers = factored_layers(model)
    if getattr(config, "layer_replication", None):
        raise UsageError("`layer_replication` repeats blocks, which a decomposed model cannot; leave it out.")
    _check_parameters(model, config, layers)
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    _resolve_all_linear(model, config, layers)
    wanted = _targets(tuner, model, config)
    hosts = [name for name in wanted if name.endswith(".host") and name.removesuffix(".host") in layers]
    present = [n for n, y in layers.items() if isinstance(y.host, BaseTunerLayer)]
    if (present or hosts) and len(hosts) < len(wanted):
        other = next(name for name in wanted if name not in hosts)
        raise UsageError(
            f"The model has an adapter that is L and R of '{(present or hosts)[0]}' (mode factors or split), beside "
            f"which PEFT cannot wrap '{other}'; load the base model again for the other adapter."
        )
    whole = [name for name in wanted if name in layers]
    if whole:
        _check_whole(config, whole, wanted, layers)
    if hosts:
        _check_hosts(model, config, hosts)
    for name in wanted:
        base = _base(model.get_submodule(name))
        if isinstance(base, QuantizedLinear | PivotedLinear) and name not in hosts:
            _check_packed(config, name, base)
    if isinstance(config, LoraConfig):
        kinds: tuple[type[nn.Module], ...] = (QuantizedLinear, ZeroLinear, FrozenSum) if hosts else ()
        own: dict[type[nn.Module], type[nn.Module]] = {FactoredLinear: LayerLora, FrozenBasis: BasisLora}
        config._register_custom_module(own | dict.fromkeys(kinds, HostLora))  # the first that fits is taken


def _targets(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> list[str]:
    """The modules that PEFT will wrap, or has wrapped and will add to."""
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    names = (name for name, _ in model.named_modules() if name and not name.startswith(tuple(inside)))
    if getattr(config, "target_modules", None) is None:
        return []
    return [name for name in names if tuner._check_target_module_exists(config, name)]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _resolve_all_linear(model: nn.Module, config: PeftConfig, layers: dict[str, FactoredLinear]) -> None:
    """`all-linear` as the names of the original's linear layers, of which PEFT would find the parts."""
    wanted = getattr(config, "target_modules", None)
    if not isinstance(wanted, str) or wanted.lower() != "all-linear":
        return
    assert isinstance(config, LoraConfig) or hasattr(config, "target_modules")
    _maybe_include_all_linear_layers(config, model)
    names: set[str] = set(config.target_modules)  # type: ignore[attr-defined]
    parts = {name for name in names if any(name.startswith(f"{layer}.") for layer in layers)}
    if isinstance(config, LoraConfig):
        names = (names - parts) | set(layers)
    else:  # which wraps L and R, as a backbone has no place for its product
        names -= {name for name in parts if name.rpartition(".")[2] in ("backbone", "host", "rest")}
    config.target_modules = names  # type: ignore[attr-defined]


def _check_parameters(model: nn.Module, config: PeftConfig, layers: dict[str, FactoredLinear]) -> None:
    experts = unfused_parameters(model)
    for target in getattr(config, "target_parameters", None) or ():
        stored = [f"{name}.weight" for name in layers] + experts
        found = [name for name in stored if name == target or name.endswith(f".{target}")]
        if found:
            raise UsageError(
                f"`target_parameters` names '{found[0]}', which is decomposed and so no parameter; use {_CHILDREN}."
            )


def variant_of(config: LoraConfig) -> str | None:
    """The option by which a LoRA is more than W + s B A, or starts from the weight it is put on."""
    declared = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    for name in dict.fromkeys((*declared, *_OLD_VARIANTS)):
        if getattr(config, name, None):
            return name
    start = config.init_lora_weights
    return None if start in _BLIND_STARTS else f"init_lora_weights={start!r}"


def _check_whole(config: PeftConfig, whole: list[str], wanted: list[str], layers: dict[str, FactoredLinear]) -> None:
    name = whole[0]
    inside = [other for other in wanted if any(other.startswith(f"{layer}.") for layer in whole)]
    if inside:
        raise UsageError(
            f"`target_modules` matches the decomposed layer '{name}' and its part '{inside[0]}'; name the layers, or "
            f"their parts by {_CHILDREN}."
        )
    adapted = [n for n in whole if any(isinstance(child, BaseTunerLayer) for child in layers[n].children())]
    if adapted:
        raise UsageError(
            f"The parts of '{adapted[0]}' have an adapter already, which would not be found again inside another; load "
            f"the base model again, or use {_CHILDREN}."
        )
    if type(config) is not LoraConfig:
        raise UsageError(
            f"`target_modules` names '{name}', a decomposed layer, around which {_kind(config)} cannot be put; use "
            f"{_CHILDREN}, the factors it is made of."
        )
    variant = variant_of(config)
    if variant is not None:
        raise UsageError(
            f"`{variant}` needs a stored weight, which the decomposed layer '{name}' does not have; leave it out, "
            f"or use {_CHILDREN}."
        )


def _check_hosts(model: nn.Module, config: PeftConfig, hosts: list[str]) -> None:
    if not isinstance(config, LoraConfig):
        raise UsageError(f"'{hosts[0]}' holds L and R themselves, around which {_kind(config)} cannot be put.")
    routes = {name: getattr(model.get_submodule(name.removesuffix(".host")), "route", None) for name in hosts}
    started = {name: route.rank for name, route in routes.items() if isinstance(route, Route) and route.start}
    check_host_config(config, started)


def check_host_config(config: LoraConfig, ranks: dict[str, int]) -> None:
    """Whether a configuration fits hosts whose factors have these ranks."""
    refused = "lora_bias" if getattr(config, "lora_bias", False) else variant_of(config)
    if refused is not None:
        raise UsageError(f"`{refused}` does not fit an adapter that is L and R (mode factors or split); leave it out.")
    for name, started in ranks.items():
        patterns = config.rank_pattern or {}
        rank = patterns.get(get_pattern_key(list(patterns), name), config.r)
        if rank != started:
            raise CheckpointError(
                f"The adapter does not fit its base model: it has rank {rank} in '{name}', whose factors have rank "
                f"{started}; load it on the checkpoint it was trained on, or give it that rank."
            )


def _check_packed(config: PeftConfig, name: str, base: QuantizedLinear | PivotedLinear) -> None:
    variant = variant_of(config) if isinstance(config, LoraConfig) else None
    if _kind(config) not in _BLIND or variant is not None:
        stored = "pivoted factors" if isinstance(base, PivotedLinear) else f"{base.quantizer.name} codes"
        raise UsageError(
            f"`{variant or _kind(config)}` reads the weight of '{name}', which is stored as {stored}; use plain LoRA, "
            "or a model whose factors are plain float32 (`form`, `factor_format`)."
        )


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _guard(tuner: BaseTuner) -> None:
    """Let the operations that would be wrong say so, on this tuner alone."""
    if "_lord_tune_guarded" in tuner.__dict__:
        return
    tuner._lord_tune_guarded = True  # type: ignore[assignment]
    tuner._check_merge_allowed = functools.partial(_check_stock_merge, tuner)  # type: ignore[method-assign]
    tuner.register_load_state_dict_post_hook(_check_loaded)
    if hasattr(tuner, "add_weighted_adapter"):
        tuner.add_weighted_adapter = functools.partial(_add_weighted, tuner)  # type: ignore[assignment]
    if isinstance(tuner, IA3Model):
        tuner._enable_peft_forward_hooks = _without_rows  # type: ignore[assignment]


def _add_weighted(tuner: BaseTuner, *args: Any, **kwargs: Any) -> None:
    if any(isinstance(module, HostLora) for module in tuner.model.modules()):
        raise UsageError(
            "add_weighted_adapter cuts the sum of two adapters back to one's rank, which adapters that are L and R "
            "(mode factors or split) cannot be; activate several with base_model.set_adapter([...]), scaled by "
            "`set_scale` of their layers: they add up exactly."
        )
    type(tuner).add_weighted_adapter(tuner, *args, **kwargs)  # type: ignore[attr-defined]


def _without_rows(*args: object, **kwargs: object) -> Any:
    if kwargs.get("adapter_names") is not None:
        raise UsageError("PEFT has no `adapter_names` for IA3 (mode scales) and would ignore them; set one adapter.")
    return nullcontext()


def _check_stock_merge(tuner: BaseTuner) -> None:
    """PEFT asks this before it merges. It adds to (LoRA) or multiplies (IA3) the stored tensor in its own dtype, be it
    codes; right in float32 alone."""
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            own = isinstance(
                base, CastLinear | QuantizedLinear | PivotedLinear | ZeroLinear | FrozenSum | FactoredLinear
            )
            if isinstance(base, PivotedLinear):
                raise UsageError(
                    f"PEFT's merge cannot add the adapter to '{name}', which is stored in pivoted form; use "
                    "lord_tune.merge or lord_tune.fold, which are exact."
                )
            if own and not (isinstance(base, CastLinear) and base.weight.dtype == torch.float32):
                raise UsageError(
                    f"PEFT's merge would round the adapter into '{name}', whose weights are not float32; "
                    "use lord_tune.merge or lord_tune.fold, which are exact."
                )
    type(tuner)._check_merge_allowed(tuner)


class _LoadResult(Protocol):
    """What `load_state_dict` returns."""

    unexpected_keys: list[str]


def _check_loaded(model: nn.Module, result: _LoadResult) -> None:
    """After tensors were loaded into a PEFT model, which drops those that have no place."""
    stray = [key for key in result.unexpected_keys if "lora_" in key or "ia3_" in key]
    if stray:
        raise CheckpointError(
            f"The adapter holds {stray[0]}, which has no place in this model; load it with lord_tune.load_adapter, on "
            "the checkpoint it was trained on."
        )
