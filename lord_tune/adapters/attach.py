"""Training a factored model through PEFT, in five modes, each an ordinary PEFT adapter.

factors: PEFT wraps a child `host` of each factored layer (the backbone Q, or a zero map where there is none) with an
ordinary LoRA layer whose lora_A weight *is* R and whose lora_B weight *is* L: the same parameters, moved, so nothing is
held twice. lora_alpha equals r for every layer, so the scaling is 1. The saved adapter is an ordinary LoRA adapter. The
child has a name of its own, because a stock `PeftModel.from_pretrained` on the factored checkpoint would otherwise
find the backbone and add L R a second time; like this the children are made when PEFT asks for them (hosts.py).

split: the same with the first components of L and R only (`decompose --top-rank`); the host is then Q with the others,
which stay in their low-precision format.

lora: stock LoRA on the `left` and `right` children, or on one of them; they may themselves be NF4 (QLoRA over LoRD).
Components apart, and layers that stayed dense, are not trained.

scales: stock IA3 on the `right` children: component i of L R is multiplied by a learnable number, which starts as 1
(the singular values of Basis Selection, Li et al. 2024, arXiv 2405.15877, in the basis that the decomposition found);
on the `left` ones too if asked: W = Q + D_out L D R (Bolaco's diagonal post-training, Ji et al. 2024, arXiv
2405.10616). Components apart get numbers of their own. Q is not scaled.

basis: the singular values of L R and new components beside it, in the child `host`; see basis.py.

`disable_adapter()`, an adapter that trains other layers only, and a deleted or unloaded one all give the decomposed
model: in the first two modes a layer then computes with the factors it started from (wrappers.py), which are read from
its checkpoint. (In a 16-bit model they compute in 16 bits then, those that train in float32.) Several adapters are
PEFT's (`load_adapter`, `set_adapter`, `delete_adapter`), one per row of a batch too (`adapter_names`); one of the
first two modes is a difference to what the layer started from, so several add up, and a scale of 0 is the base.

PEFT's own configurations work as well (`get_peft_model`, trl's `peft_config`): injection.py translates their targets.

Merging is ours in all modes: A and B are folded back into R and L, exactly. PEFT's merge rounds into 16-bit factors and
fails on packed ones with a message about tensor sizes; it is refused unless every weight it would change is float32.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import LordError, LordWarning, UsageError, unknown_name
from ..layers import (
    FactoredLinear,
    FrozenBasis,
    FrozenSum,
    factored_layers,
    plain_model,
)
from ..protocols import CausalModel
from .hosts import FACTORS, LORA, SPLIT, check_trainable, host_factors
from .injection import check_host_config
from .route import names_in, wrappers_of
from .stored_tensors import StoredTensors
from .wrappers import BasisLora

SCALES, BASIS = "scales", "basis"
MODES = (FACTORS, SPLIT, LORA, SCALES, BASIS)
BOTH, LEFT, RIGHT, SMALLER = "both", "left", "right", "smaller"
COMPONENTS, COMPONENTS_AND_OUTPUTS = "components", "components_and_outputs"
_WRAPPED = r"(.*\.)?({})"
_OWN_PATTERNS = 256
_HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_DECIDED = frozenset(  # by the arguments of add_lora
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern target_parameters "
    "layer_replication task_type peft_type inference_mode fan_in_fan_out".split()
)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which layers train."""

    mode: str
    trained: dict[str, int]  # layer -> rank that trains; components that are scaled, and new ones
    untouched: list[str]  # factored layers outside the targets
    trainable_parameters: int


def expose_factors(
    model: CausalModel, targets: str | None = None, adapter_name: str = "default", mode: str = FACTORS
) -> PeftModel:
    """Make L and R of the factored layers (those matching the regex `targets`) the trainable PEFT adapter.

    mode: "factors", or "split" for the components that were stored apart (`--top-rank`). Factors stored in 16 bits are
    widened to float32 for training; quantized ones have no gradient, so they are refused (use `add_lora`).

    A model that has an adapter of this mode gets a further one, a copy of the factors the first one started from.
    """
    return attach_factors(model, targets, adapter_name, mode, None)


def attach_factors(
    model: CausalModel, targets: str | None, adapter_name: str, mode: str, config: LoraConfig | None
) -> PeftModel:
    """`expose_factors` with the configuration of a saved adapter, whose tensors are still to be loaded."""
    chosen = chosen_layers(model, targets, mode)
    for name, layer in chosen.items():
        if layer.host is None:
            check_trainable(name, layer, mode)
    if config is not None:
        check_host_config(config, {f"{name}.host": layer.plan.top_rank or layer.rank for name, layer in chosen.items()})
    stored = StoredTensors(plain_model(model))
    factors = {name: host_factors(name, layer, mode, stored) for name, layer in chosen.items()}
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    peft_model = wrap(model, config or _host_config(ranks, task_type_of(model)), adapter_name)
    trains = adapter_name in peft_model.active_adapters
    for name, layer in chosen.items():
        left, right = factors.pop(name)
        for matrices, value in ((layer.host.lora_A, right), (layer.host.lora_B, left)):
            value = value if value.dtype == torch.float32 else value.detach().float()
            value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            matrices[adapter_name].weight = value.requires_grad_(trains)
        if config is None:
            _check_realised(name, layer, ranks[name], adapter_name)
    return peft_model


def _host_config(ranks: dict[str, int], task_type: str | None) -> LoraConfig:
    patterns = _patterns({f"{name}.host": rank for name, rank in ranks.items()})
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=exactly([f"{name}.host" for name in ranks]),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        task_type=task_type,
    )


def add_lora(
    model: CausalModel,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | None = None,
    adapter_name: str = "default",
    on: str = BOTH,
    **options: object,
) -> PeftModel:
    """LoRA of rank `rank` on L and R of the factored layers, which stay frozen (and may be quantized).

    alpha: LoRA's scaling is alpha / rank; default 2 rank. on: "both"; "left" or "right", L or R alone; "smaller",
    the one of the two with fewer rows or columns beside the rank, per layer. With one of the two, the update of L R has
    rank `rank` all the same, at a half or less of the parameters: rank (rank of the layer + its in- or outputs).
    options: others of peft.LoraConfig (`use_rslora`, `use_dora` and PiSSA where L and R are not packed, `bias`,
    `modules_to_save`, ...); UsageError for those that say where or how strong, which are arguments of this function.
    """
    if rank < 1:
        raise UsageError(f"Got `lora_r` {rank}; expected at least 1.")
    if on not in (BOTH, LEFT, RIGHT, SMALLER):
        raise UsageError(f"Got `lora_on` {on!r}; expected {BOTH}, {LEFT}, {RIGHT} or {SMALLER}.")
    known = {field.name for field in dataclasses.fields(LoraConfig)} - _DECIDED
    for name in options:
        if name in _DECIDED:
            raise UsageError(f"add_lora decides `{name}` by its rank, alpha, dropout, targets and on; leave it out.")
        if name not in known:
            raise unknown_name("option of add_lora", name, known)
    paths = [f"{name}.{s}" for name, layer in chosen_layers(model, targets, LORA).items() for s in _sides(layer, on)]
    given: dict[str, Any] = {"bias": "none", "task_type": task_type_of(model), **options}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is fine
        target_modules=exactly(paths),
        lora_dropout=dropout,
        **given,
    )
    peft_model = wrap(model, config, adapter_name)
    for path in paths:
        factor = plain_model(peft_model).get_submodule(path)
        if not isinstance(factor, LoraLayer) or adapter_name not in factor.r:
            raise LordError(f"PEFT did not wrap '{path}'; report this model.")
    return peft_model


def _sides(layer: FactoredLinear, on: str) -> list[str]:
    smaller = RIGHT if layer.in_features <= layer.out_features else LEFT
    return [LEFT, RIGHT] if on == BOTH else [smaller if on == SMALLER else on]


def add_scales(
    model: CausalModel, targets: str | None = None, adapter_name: str = "default", on: str = COMPONENTS
) -> PeftModel:
    """A learnable number for each component of L R (see the top), float32, starting as 1; L and R may be quantized.

    on: "components", or "components_and_outputs" for one per output as well.
    """
    if on not in (COMPONENTS, COMPONENTS_AND_OUTPUTS):
        raise UsageError(f"Got `scales_on` {on!r}; expected {COMPONENTS} or {COMPONENTS_AND_OUTPUTS}.")
    sides = (RIGHT,) if on == COMPONENTS else (RIGHT, LEFT)
    paths = []
    for name, layer in chosen_layers(model, targets, SCALES).items():
        for prefix in ("", "top_") if layer.top_left is not None else ("",):
            paths += [f"{name}.{prefix}{side}" for side in sides]
    config = IA3Config(target_modules=exactly(paths), feedforward_modules=[], task_type=task_type_of(model))
    peft_model = wrap(model, config, adapter_name)
    for path in paths:
        factor = plain_model(peft_model).get_submodule(path)
        if not isinstance(factor, IA3Layer) or factor.is_feedforward:
            raise LordError(f"PEFT did not wrap '{path}' with scales of its outputs; report this model.")
        # PEFT's move to float32 makes the scales of an adapter that is not the active one trainable
        factor.ia3_l[adapter_name].requires_grad_(adapter_name in peft_model.active_adapters)
    return peft_model


def chosen_layers(model: CausalModel, targets: str | None, mode: str) -> dict[str, FactoredLinear]:
    """The layers to train; warns of those left out."""
    layers = factored_layers(plain_model(model))
    if not layers:
        raise UsageError("The model has no factored layers; run `lord-tune decompose` first and train its output.")
    present = mode_of(model)
    if present is None and has_adapters(model):
        raise UsageError(
            f"The model already has adapters, none of mode {mode}, so one of that mode cannot be added; fold or unload "
            "them, or load the base model again."
        )
    if present not in (None, mode):
        raise UsageError(
            f"The model already has an adapter of mode {present}, so one of mode {mode} cannot be added; load the base "
            "model again."
        )
    try:
        chosen = {name: layer for name, layer in layers.items() if targets is None or re.search(targets, name)}
    except re.error as error:
        raise UsageError(f"`targets` {targets!r} is not a regular expression ({error}); correct it.") from error
    rest = [name for name in layers if name not in chosen]
    if not chosen:
        raise UsageError(
            f"`targets` {targets!r} matches none of the {len(layers)} factored layers; they are named like {rest[0]}."
        )
    if any(layer.rank < 1 for layer in chosen.values()):
        raise UsageError(
            "The model was decomposed with rank 0, so it has no L and R to train. Decompose it with `rank` 16."
        )
    if rest:
        shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        warnings.warn(f"{len(rest)} of {len(layers)} factored layers do not train: {shown}.", LordWarning, stacklevel=3)
    return chosen


def _patterns(ranks: dict[str, int]) -> dict[str, int]:
    """PEFT's rank_pattern. PEFT tries every pattern on every module, and Python keeps 512 compiled ones; beyond that,
    thousands of experts would take hours, so the modules of a rank share one pattern."""
    if len(ranks) <= _OWN_PATTERNS:
        return {f"^{re.escape(path)}$": rank for path, rank in ranks.items()}
    paths: dict[int, list[str]] = {}
    for path, rank in ranks.items():
        paths.setdefault(rank, []).append(re.escape(path))
    return {f"^({'|'.join(found)})$": rank for rank, found in paths.items()}


def exactly(paths: list[str]) -> str:
    return _WRAPPED.format("|".join(re.escape(path) for path in paths))


def wrap(model: CausalModel, config: PeftConfig, adapter_name: str) -> PeftModel:
    """The PEFT model with an adapter more; a first one is active, further ones are not."""
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise UsageError(f"The model already has an adapter '{adapter_name}'; give another adapter_name.")
        model.add_adapter(adapter_name, config)
        return model
    config.base_model_name_or_path = model.name_or_path
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    base = config.base_model_name_or_path
    if base and Path(base).is_dir():  # the adapter may be loaded from elsewhere, where the name is another model's
        config.base_model_name_or_path = str(Path(base).resolve())
    assert isinstance(peft_model, PeftModel)
    return peft_model


def task_type_of(model: CausalModel) -> str | None:
    """PEFT's name for the model's kind of head, by which it also trains and saves a new classification head."""
    plain = plain_model(model)
    kind = type(plain).__name__
    for ending, task in _HEADS.items():
        if ending in kind:
            return task
    if not plain.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if getattr(plain.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _check_realised(name: str, layer: FactoredLinear, rank: int, adapter: str) -> None:
    """PEFT ignores rank patterns that match nothing; refuse to train another rank than was asked for."""
    host = layer.host
    realised = (host.r[adapter], host.lora_A[adapter].out_features, host.lora_B[adapter].in_features)
    if realised != (rank, rank, rank) or host.scaling[adapter] != 1.0:
        raise LordError(
            f"PEFT gave '{name}' the ranks {realised} and the scaling {host.scaling[adapter]}; expected rank {rank} "
            "everywhere and scaling 1. Report this model."
        )


def mode_of(model: nn.Module) -> str | None:
    """factors, split, lora, scales, basis, or None for a model without an adapter inside its decomposed layers."""
    for layer in factored_layers(model).values():
        if isinstance(layer.host, LoraLayer):
            base = layer.host.get_base_layer()
            return BASIS if isinstance(base, FrozenBasis) else SPLIT if isinstance(base, FrozenSum) else FACTORS
        for wrapper in wrappers_of(layer):
            if isinstance(wrapper, IA3Layer | LoraLayer):
                return SCALES if isinstance(wrapper, IA3Layer) else LORA
    return None


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put something into the model, or around it."""
    return any(isinstance(m, PeftModel | BaseTunerLayer | AuxiliaryTrainingWrapper) for m in model.modules())


def coverage(model: CausalModel, adapter_name: str = "default") -> Coverage:
    """Which factored layers of an exposed model train, and how many parameters."""
    trained, untouched = {}, []
    for name, layer in factored_layers(plain_model(model)).items():
        wrappers = [wrapper for wrapper in wrappers_of(layer) if adapter_name in names_in(wrapper)]
        if not wrappers:
            untouched.append(name)
        else:
            new = wrappers[0].r[adapter_name] if isinstance(wrappers[0], LoraLayer) else 0
            trained[name] = new + (layer.rank if isinstance(wrappers[0], BasisLora | IA3Layer) else 0)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Coverage(mode_of(model) or "none", trained, untouched, total)
