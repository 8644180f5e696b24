"""The transformers plugin: checkpoints with `quant_method: lord` load through `from_pretrained`.

The model is on the meta device when experts are unfused and modules swapped; their parameter names equal the keys, so
transformers' ordinary loader fills them (sharded files, device_map, no converter that would break `save_pretrained`).
`register` is called when `lord_tune` is imported, or later, when transformers' quantizer module is (see __init__).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..declared import PIVOTED, PLAIN
from ..errors import CheckpointError
from ..layers import (
    FactoredLinear,
    Packed,
    PivotedLinear,
    QuantizedLinear,
    check_plain,
    dense_tables,
    densify,
    factored_layers,
    is_linear,
    put_table,
    sentinels_of,
    stored_tables,
    unfuse,
    unfused_parameters,
    weight_of,
)
from ..plans import EMBEDDINGS_VERSION, FORMAT_VERSION, LayerPlan, TablePlan
from ..quantizers import DTYPES
from .remote_code import remove_remote_code, saves_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # this file is imported while transformers is

QUANT_METHOD = "lord"


@register_quantization_config(QUANT_METHOD)
class LordConfig(QuantizationConfigMixin):
    """The manifest inside `config.json`."""

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, object]] | None = None,
        format_version: int = FORMAT_VERSION,
        unfused: Iterable[str] = (),  # parameters whose experts are layers of their own, decomposed or not
        embeddings: Mapping[str, object] | None = None,  # module -> how the embedding or output head is stored
        **unknown: object,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        if format_version > EMBEDDINGS_VERSION:
            raise CheckpointError(
                f"The checkpoint has format version {format_version}, this lord_tune reads up to {EMBEDDINGS_VERSION}; "
                "update lord_tune."
            )
        self.format_version = EMBEDDINGS_VERSION if embeddings else FORMAT_VERSION
        self.layers = dict(layers or {})
        if unfused:
            self.unfused = list(unfused)
        if embeddings:
            self.embeddings = dict(embeddings)

    def plans(self) -> dict[str, LayerPlan]:
        return {name: LayerPlan.from_dict(name, content) for name, content in self.layers.items()}

    def tables(self) -> dict[str, TablePlan]:
        content = getattr(self, "embeddings", {})
        return {name: TablePlan.from_dict(name, entry) for name, entry in content.items()}


@register_quantizer(QUANT_METHOD)
class LordQuantizer(HfQuantizer):
    """Rebuilds the skeleton from the manifest; trainable through adapters."""

    quantization_config: LordConfig
    requires_calibration = True  # refuses to quantize on the fly: that is `lord-tune decompose`

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        remove_remote_code(model.config)
        saves_remote_code(model)
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""

        def found_in(present: Container[str], name: str) -> str | None:
            # a checkpoint of a model with a head also loads into the bare model, and the other way round
            return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in present), None)

        parameters = dict(model.named_parameters())
        wanted = {name: found_in(parameters, name) for name in getattr(self.quantization_config, "unfused", ())}
        done = unfuse(model, [found for found in wanted.values() if found is not None])
        for name, found in wanted.items():
            if found not in done:
                raise CheckpointError(
                    f"The checkpoint names the experts '{name}', which {type(model).__name__} does not have as a 3-D "
                    "parameter; load the checkpoint with the model class it was made from."
                )
        modules = dict(model.named_modules())
        for name, plan in self.quantization_config.plans().items():
            found = found_in(modules, name)
            if found is None or not is_linear(modules[found]):
                raise CheckpointError(
                    f"The manifest names the layer '{name}', which {type(model).__name__} does not have as a linear "
                    "layer; load the checkpoint with the model class it was made from."
                )
            old = modules[found]
            if tuple(weight_of(old).shape) != plan.shape:
                raise CheckpointError(
                    f"Layer '{name}' is {plan.shape} in the manifest and {tuple(weight_of(old).shape)} in the model; "
                    "config.json and the manifest do not belong together."
                )
            with torch.device("meta"):
                model.set_submodule(found, FactoredLinear(plan, device="meta", dtype=weight_of(old).dtype))
        for name, table in self.quantization_config.tables().items():
            put_table(model, name, table, lambda known: found_in(modules, known))
        _ignore_sentinels(model, self.quantization_config)
        _expect_scalars(model, checkpoint_files or [])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        for layer in factored_layers(model).values():  # the loader lets every floating tensor require gradients
            layer.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Packed):
                parts = module.parts()
                if any(not part.dim() for part in parts.values()):
                    module.set_parts({name: part.reshape(part.shape or 1) for name, part in parts.items()})

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the file. Refreshes the manifest: ranks and formats may have changed since loading (merged
        adapters)."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # with it transformers saves the adapter alone
            check_plain(model)
        self.quantization_config.layers = manifest_of(model)
        tied = getattr(model, "all_tied_weights_keys", None) or {} if stored_tables(model) else {}
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        return own | sentinels_of(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        densify(model, dtype)
        dense_tables(model, dtype)
        return model


def _ignore_sentinels(model: PreTrainedModel, config: LordConfig) -> None:
    """Let the loader pass over them. One pattern for all layers whose names differ in numbers: it tries each pattern on
    each key, and experts are thousands."""
    weights = (f"{name}.weight" for name in (*config.layers, *config.tables()))
    keys = [*weights, *getattr(config, "unfused", ())]
    patterns = {rf"(^|\.){re.sub(r'[0-9]+', '[0-9]+', re.escape(key))}$" for key in keys}
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *patterns}


def _expect_scalars(model: nn.Module, files: list[str]) -> None:
    """Prepare packed layers for parts that checkpoints of earlier versions hold without dimensions: `nested_offset`."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not any("nested_offset" in module.parts() for module in packed.values()):
        return
    for path in files:
        if not str(path).endswith(".safetensors"):
            continue
        with safe_open(path, framework="pt") as file:
            old = [key for key in file.keys() if key.endswith(".nested_offset") and not file.get_slice(key).get_shape()]
        for key in old:
            for name, module in packed.items():
                if f".{key}".endswith(f".{name}.nested_offset") or f".{name}.nested_offset".endswith(f".{key}"):
                    module.set_parts(module.parts() | {"nested_offset": torch.empty((), device="meta")})


def realised_plan(layer: FactoredLinear) -> LayerPlan:
    """The plan with the rank and formats the layer's modules have now."""
    assert layer.left is not None and layer.right is not None, "factors are exposed; fold them first"
    plan = layer.plan
    left = layer.left.rest if isinstance(layer.left, PivotedLinear) else layer.left
    forms = [_form_of(factor) for factor in (left, layer.right)]
    top_form = "fp32" if layer.top_right is None else _form_of(layer.top_right)
    top_rank = 0 if layer.top_right is None else layer.top_right.out_features
    return dataclasses.replace(
        plan,
        rank=layer.right.out_features + top_rank,
        left_format=forms[0],
        right_format=forms[1],
        factor_options=plan.factor_options if any(form not in DTYPES for form in forms) else {},
        top_rank=top_rank,
        top_format=top_form,
        top_options={} if top_form in DTYPES else plan.top_options,
        form=PLAIN if left is layer.left else PIVOTED,
        bias=layer.bias is not None,
    )


def _form_of(factor: nn.Module) -> str:
    if isinstance(factor, QuantizedLinear):
        return factor.quantizer.name
    own = factor.get_parameter("weight").dtype
    return next(key for key, dtype in DTYPES.items() if dtype == own)


def manifest_of(model: nn.Module) -> dict[str, Mapping[str, object]]:
    """Layer name -> plan, as JSON."""
    return {name: realised_plan(layer).to_dict() for name, layer in factored_layers(model).items()}


def lord_config(model: nn.Module, layers: Mapping[str, Mapping[str, object]]) -> LordConfig:
    """The manifest of a model with these layers, and the embeddings that it has."""
    embeddings = {name: table.to_dict() for name, table in stored_tables(model).items()}
    return LordConfig(layers, unfused=unfused_parameters(model), embeddings=embeddings)


def attach(model: PreTrainedModel) -> None:
    """Make a decomposed model savable by `save_pretrained`, as if it had been loaded from a factored checkpoint."""
    config = lord_config(model, manifest_of(model))
    model.config.quantization_config = config
    model.__dict__ |= {
        "hf_quantizer": LordQuantizer(config),
        "is_quantized": True,
        "quantization_method": QUANT_METHOD,
    }


def detach(model: PreTrainedModel) -> None:
    """Make a densified model an ordinary one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(key, None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_is_quantized", None)
