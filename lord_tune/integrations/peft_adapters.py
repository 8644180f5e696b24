"""L and R through PEFT: as the adapter itself (`factors`), or with LoRA on top of them (`lora`).

factors: PEFT wraps a child `host` of each factored layer (the backbone Q, or a zero map where there is none) with an
ordinary LoRA layer whose lora_A weight *is* R and whose lora_B weight *is* L: the same parameters, moved, so nothing is
held twice. lora_alpha equals r for every layer, so the scaling is 1. The saved adapter is an ordinary LoRA adapter. The
child has a name of its own, because a stock `PeftModel.from_pretrained` on the factored checkpoint would otherwise
find the backbone and add L R a second time; like this it stops with "target modules not found", and `lord_tune.load`
is the way in. `disable_adapter()` then means Q alone.

split: the same with the first components of L and R only (`decompose --top-rank`); the host is then Q with the others,
which stay in their low-precision format.

lora: stock LoRA on the `left` and `right` children, which may themselves be NF4 (QLoRA over LoRD).

Merging is ours in both modes: A and B are folded back into R and L, exactly. PEFT's merge would round into the 4-bit
base, which loses most of the update.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import CheckpointError, LordError, LordWarning, UsageError
from ..layers import (
    CastLinear,
    FactoredLinear,
    FrozenSum,
    QuantizedLinear,
    ZeroLinear,
    dense_factor,
    factored_layers,
)
from .transformers_quantizer import realised_plan

FACTORS, SPLIT, LORA = "factors", "split", "lora"
_HOST = r"(.*\.)?({})\.host"
_PAIR = r"(.*\.)?({})\.(left|right)"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which layers train."""

    mode: str
    trained: dict[str, int]  # layer -> rank that trains
    untouched: list[str]  # factored layers outside the targets
    trainable_parameters: int


def _chosen(model: Any, targets: str | None) -> tuple[dict[str, FactoredLinear], list[str]]:
    layers = factored_layers(model)
    if not layers:
        raise UsageError("The model has no factored layers; run `lord-tune decompose` first and train its output.")
    try:
        chosen = {name: layer for name, layer in layers.items() if targets is None or re.search(targets, name)}
    except re.error as error:
        raise UsageError(f"targets {targets!r} is not a regular expression ({error}); correct it.") from error
    rest = [name for name in layers if name not in chosen]
    if not chosen:
        raise UsageError(f"targets {targets!r} matches none of the {len(layers)} factored layers, like {rest[0]}.")
    if any(layer.rank < 1 for layer in chosen.values()):
        raise UsageError("The model was decomposed with rank 0: it has no L and R to train. Decompose with --rank 16.")
    if rest:
        shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        warnings.warn(f"{len(rest)} of {len(layers)} factored layers do not train: {shown}.", LordWarning, stacklevel=3)
    return chosen, rest


def _alternatives(names: list[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def expose_factors(model: Any, targets: str | None = None, adapter_name: str = "default", mode: str = FACTORS) -> Any:
    """Make L and R of the factored layers (those matching the regex `targets`) the trainable PEFT adapter.

    mode: "factors", or "split" for the components that were stored apart (`--top-rank`). Factors stored in 16 bits are
    widened to float32 for training; quantized ones have no gradient, so they are refused (use `add_lora`).
    """
    chosen, _ = _chosen(model, targets)
    take = _take_top if mode == SPLIT else _take_all
    for name, layer in chosen.items():
        _check_trainable(name, layer, mode)
    factors: dict[str, tuple[Tensor, Tensor]] = {name: take(layer) for name, layer in chosen.items()}
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    largest = max(ranks.values())
    patterns = {rf"^{re.escape(name)}\.host$": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=_HOST.format(_alternatives(list(chosen))),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        task_type=_task_type(model),
    )
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    for name, layer in chosen.items():
        left, right = factors.pop(name)
        for matrices, value in ((layer.host.lora_A, right), (layer.host.lora_B, left)):
            value = value if value.dtype == torch.float32 else nn.Parameter(value.detach().float())
            matrices[adapter_name].weight = value.requires_grad_(True)
    _check_realised(peft_model, chosen, ranks, adapter_name)
    return peft_model


def _check_trainable(name: str, layer: FactoredLinear, mode: str) -> None:
    if mode == SPLIT and layer.top_left is None:
        raise UsageError(f"'{name}' has no components stored apart; decompose with --top-rank, or use mode: factors.")
    if mode == FACTORS and layer.top_left is not None:
        usable = LORA if isinstance(layer.top_left, QuantizedLinear) else SPLIT
        raise UsageError(f"'{name}' has its first {layer.plan.top_rank} components stored apart; use mode: {usable}.")
    pair = (layer.top_left, layer.top_right) if mode == SPLIT else (layer.left, layer.right)
    if any(isinstance(factor, QuantizedLinear) for factor in pair):
        form = layer.plan.top_format if mode == SPLIT else layer.plan.left_format
        raise UsageError(
            f"The factors of '{name}' are stored as {form}, which cannot be trained directly; use mode: lora."
        )


def _take_all(layer: FactoredLinear) -> tuple[Tensor, Tensor]:
    left, right = layer.left.weight, layer.right.weight
    layer.host = layer.backbone or ZeroLinear(layer.in_features, layer.out_features, left.device)
    layer.left = layer.right = layer.backbone = None
    return left, right


def _take_top(layer: FactoredLinear) -> tuple[Tensor, Tensor]:
    left, right = layer.top_left.weight, layer.top_right.weight
    layer.host = FrozenSum(layer.left, layer.right, layer.backbone)
    layer.left = layer.right = layer.backbone = layer.top_left = layer.top_right = None
    return left, right


def add_lora(
    model: Any,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | None = None,
    adapter_name: str = "default",
) -> Any:
    """LoRA of rank `rank` on L and on R of the factored layers, which stay frozen (and may be quantized).

    alpha: LoRA's scaling is alpha / rank; default 2 rank.
    """
    if rank < 1:
        raise UsageError(f"lora_r {rank} came; a rank is at least 1.")
    chosen, _ = _chosen(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is fine
        target_modules=_PAIR.format(_alternatives(list(chosen))),
        lora_dropout=dropout,
        bias="none",
        task_type=_task_type(model),
    )
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    for name, layer in chosen.items():
        for factor in (layer.left, layer.right):
            if not isinstance(factor, LoraLayer) or factor.r[adapter_name] != rank:
                raise LordError(f"PEFT did not wrap the factors of '{name}' at rank {rank}; report this model.")
    return peft_model


def _task_type(model: Any) -> str | None:
    return "CAUSAL_LM" if hasattr(model, "can_generate") and model.can_generate() else None


def _check_realised(model: Any, layers: dict[str, FactoredLinear], ranks: dict[str, int], adapter: str) -> None:
    """PEFT ignores rank patterns that match nothing; refuse to train another rank than was asked for."""
    expected = 0
    for name, layer in layers.items():
        host = layer.host
        shapes = tuple(host.lora_B[adapter].weight.shape), tuple(host.lora_A[adapter].weight.shape)
        wanted = (layer.out_features, ranks[name]), (ranks[name], layer.in_features)
        if shapes != wanted or host.scaling[adapter] != 1.0 or host.r[adapter] != ranks[name]:
            raise LordError(f"PEFT realised '{name}' as {shapes} at scaling {host.scaling[adapter]}, wanted {wanted}.")
        expected += ranks[name] * (layer.out_features + layer.in_features)
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if actual != expected:
        raise LordError(f"{actual} parameters are trainable, the factors have {expected}; report this model.")


def mode_of(model: Any) -> str | None:
    """factors, split, lora, or None for a model without our adapters."""
    layers = factored_layers(model).values()
    for layer in layers:
        if layer.host is not None:
            return SPLIT if isinstance(_base_of(layer), FrozenSum) else FACTORS
    return LORA if any(isinstance(layer.left, LoraLayer) for layer in layers) else None


def coverage(model: Any, adapter_name: str = "default") -> Coverage:
    """Which factored layers of an exposed model train, and how many parameters."""
    mode = mode_of(model)
    trained, untouched = {}, []
    for name, layer in factored_layers(model.get_base_model()).items():
        if layer.host is not None:
            trained[name] = layer.host.r[adapter_name]
        elif isinstance(layer.left, LoraLayer):
            trained[name] = layer.left.r[adapter_name]
        else:
            untouched.append(name)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Coverage(mode or "none", trained, untouched, total)


def load_adapter(model: Any, folder: Path, adapter_name: str = "default") -> Any:
    """Put a saved adapter (either mode) back on its factored base."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} could not be read: {error}; write it again.") from error
    factors_mode = any(".host.lora_" in key for key in state)
    marker = ".host.lora_A" if factors_mode else ".left.lora_A"
    names = {key.removeprefix("base_model.model.").split(marker)[0] for key in state if marker in key}
    missing = sorted(names - set(factored_layers(model)))
    if missing or not names:
        what = missing[0] if missing else "(no factored layer)"
        raise CheckpointError(f"The adapter in {folder} trains {what}, which its base model does not have factored.")
    targets = rf"^({_alternatives(sorted(names))})$"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # a partial match was reported when the adapter was trained
        if factors_mode:
            mode = SPLIT if all(factored_layers(model)[name].top_left is not None for name in names) else FACTORS
            peft_model = expose_factors(model, targets, adapter_name, mode)
        else:
            peft_model = add_lora(model, config.r, config.lora_alpha, config.lora_dropout, targets, adapter_name)
    try:
        result: Any = set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name)
    except RuntimeError as error:  # shapes differ
        raise CheckpointError(
            f"The adapter in {folder} does not fit its base model, whose ranks or shapes have changed since; decompose "
            "the base as it was, or train again."
        ) from error
    absent = [key for key in result.missing_keys if "lora_" in key]
    if absent:
        raise CheckpointError(f"The adapter in {folder} lacks {absent[0]}; it is not complete, write it again.")
    if result.unexpected_keys:
        raise CheckpointError(f"The adapter in {folder} holds {result.unexpected_keys[0]}, which has no place.")
    peft_model.eval()
    return peft_model


@torch.no_grad()
def fold(model: Any, adapter_name: str = "default") -> Any:
    """Fold the adapter back into L and R and return the plain factored model; exact, the ranks are unchanged.

    factors, split: the trained parameters become `left` and `right` again. lora: L + dL and R + dR, in float32 if they
    were trained beside low-precision factors (which are decoded first, so the update is not rounded away).
    """
    base = model.get_base_model()
    for layer in factored_layers(base).values():
        if layer.host is not None:
            _fold_host(layer, adapter_name)
        elif isinstance(layer.left, LoraLayer):
            layer.left = _merged_factor(layer.left, adapter_name)
            layer.right = _merged_factor(layer.right, adapter_name)
        layer.plan = realised_plan(layer)
    for key in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(key, None)
    base.requires_grad_(False)
    return base.eval()


def _linear_of(value: Tensor) -> CastLinear:
    module = CastLinear(value.shape[1], value.shape[0], value.dtype, device="meta")
    module.weight = nn.Parameter(value.detach(), requires_grad=False)
    return module


def _base_of(layer: FactoredLinear) -> Any:
    """Q, zero or their sum with frozen components: what PEFT's layer wraps."""
    return layer.host.get_base_layer() if isinstance(layer.host, LoraLayer) else layer.host


def _fold_host(layer: FactoredLinear, adapter_name: str) -> None:
    left = _linear_of(layer.host.lora_B[adapter_name].weight)
    right = _linear_of(layer.host.lora_A[adapter_name].weight)
    base = _base_of(layer)
    if isinstance(base, FrozenSum):
        layer.top_left, layer.top_right = left, right
        layer.left, layer.right, layer.backbone = base.left, base.right, base.backbone
    else:
        layer.left, layer.right = left, right
        layer.backbone = base if isinstance(base, QuantizedLinear) else None
    layer.host = None


def _merged_factor(wrapped: Any, adapter_name: str) -> CastLinear:
    delta = wrapped.lora_B[adapter_name].weight.double() @ wrapped.lora_A[adapter_name].weight.double()
    value = dense_factor(wrapped.get_base_layer()) + wrapped.scaling[adapter_name] * delta
    return _linear_of(value.float())
