"""Export as a compressed-tensors base holding Q (format pack-quantized) and an ordinary LoRA adapter holding L and R.

The base is what vLLM, SGLang and stock transformers read: per layer `weight_packed` int32 (out, in bits / 32), with
code + 2^(bits-1) in each field, little end first; `weight_scale` (out, groups) in the model's dtype; `weight_shape`;
and of asymmetric codes `weight_zero_point`, packed along the outputs. Codes and scales are those of the checkpoint, to
the bit: the formats w2a16, w4a16 and w8a16 are this grid (quantizers/engines.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..integrations.models import DTYPE_NAMES
from ..integrations.shards import Piece
from ..layers import FactoredLinear, factored_layers
from ..quantizers import Quantizer, make_quantizer
from ..quantizers.engines import Weights, signed_codes
from .base import Job
from .parts import Parts
from .stock import (
    ADAPTER,
    BASE,
    NO_ADAPTER,
    base_pieces,
    check_adapter_form,
    empty,
    stock_outputs,
    write_adapter,
    write_base,
)


@dataclass(frozen=True)
class CompressedTensorsExport:
    """An int2, int4 or int8 base and an ordinary LoRA adapter, for inference engines."""

    name: ClassVar[str] = "compressed-tensors"
    model_folder: ClassVar[str] = BASE

    def check(self, model: PreTrainedModel) -> None:
        try:
            import compressed_tensors  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "`format` compressed-tensors needs the package of this name; run: pip install compressed-tensors"
            ) from error
        check_adapter_form(model, self.name)
        layers = factored_layers(model)
        for name, layer in layers.items():
            _check_layer(name, layer)
        kinds = [_arguments(layer) for layer in layers.values()]
        if any(kind != kinds[0] for kind in kinds) and not all(kind["symmetric"] for kind in kinds):
            raise UsageError(
                "The layers differ in bits or groups, and some have zero points, which transformers loads for one kind "
                "of layer alone; decompose with `symmetric`, or with one `backbone` and `group_size`."
            )

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        layers, dtype, parts = factored_layers(model), DTYPE_NAMES[job.dtype], Parts(model, job.store)
        inexact: list[str] = []  # layers whose scales are rounded
        pieces = base_pieces(model, layers, parts, dtype)
        pieces += [_codes(name, layer, dtype, parts, inexact) for name, layer in layers.items()]
        dense = sorted(name for name, module in model.named_modules() if _is_dense(name, module, layers))
        config = {"quantization_config": _description(layers, dense), "dtype": job.dtype}
        write_base(model, job.tokenizer, job.folder / BASE, pieces, config)
        if inexact:
            job.notes.append(
                f"scales of {len(inexact)} layers, like '{inexact[0]}', have more digits than {job.dtype} and were "
                "rounded, so that Q is not to the bit"
            )
        ranked = {name: layer for name, layer in layers.items() if layer.rank}
        if job.pad_ranks and not ranked:
            job.notes.append(NO_ADAPTER)
        if ranked:
            base = job.final / BASE
            write_adapter(model, job.tokenizer, job.folder / ADAPTER, ranked, base, dtype, job.pad_ranks, parts)
        kinds = [_arguments(layer) for layer in layers.values()]
        one = all(kind == kinds[0] for kind in kinds)  # transformers decodes all layers as the first kind
        return stock_outputs(job.folder, job.ids, model, "decode" if one else "run")

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch."), job.dtype]


def _is_dense(name: str, module: nn.Module, layers: Mapping[str, FactoredLinear]) -> bool:
    """What the target "Linear" would take for packed as well: any subclass, but no part of a decomposed layer."""
    parts = [name.rpartition(".")[0]]
    while parts[-1]:
        parts.append(parts[-1].rpartition(".")[0])
    return isinstance(module, nn.Linear) and name not in layers and not any(part in layers for part in parts)


def _check_layer(name: str, layer: FactoredLinear) -> None:
    plan = layer.plan
    if plan.backbone == "none":
        raise UsageError(
            f"'{name}' has L and R alone, so that its compressed-tensors base would be zeros; export with `format` "
            "factored or dense, or decompose with a `backbone`."
        )
    quantizer = _quantizer(layer)
    if not isinstance(quantizer, Weights):
        raise UsageError(
            f"'{name}' has backbone {plan.backbone}, which compressed-tensors does not have; decompose with `backbone` "
            "w4a16 (or w2a16, w8a16), or export with `format` factored or dense."
        )
    if layer.in_features > quantizer.group_size and layer.in_features % quantizer.group_size:
        raise UsageError(
            f"'{name}' has {layer.in_features} inputs, no multiple of its groups of {quantizer.group_size}, and "
            "engines take whole groups; decompose with `group_size` 64 or 32."
        )
    if plan.conv1d:
        raise UsageError(
            f"'{name}' is a {Conv1D.__name__}, and engines read compressed-tensors for nn.Linear alone; export with "
            "`format` factored or dense."
        )


def _quantizer(layer: FactoredLinear) -> Quantizer:
    """Of Q, which is no child of the layer while an adapter trains the factors."""
    return make_quantizer(layer.plan.backbone, layer.plan.backbone_options)


def _rounds_scales(layer: FactoredLinear, dtype: torch.dtype) -> bool:
    scales = layer.backbone.parts()["scales"]
    return not torch.equal(scales.to(dtype).float(), scales.float())


def _arguments(layer: FactoredLinear) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of a layer."""
    quantizer = _quantizer(layer)
    assert isinstance(quantizer, Weights), "checked before"
    found: dict[str, Any] = {"num_bits": quantizer.bits, "type": "int", "symmetric": quantizer.symmetric}
    if layer.in_features < quantizer.group_size:  # one group is a row
        return found | {"strategy": "channel"}
    return found | {"strategy": "group", "group_size": quantizer.group_size}


def _codes(name: str, layer: FactoredLinear, dtype: torch.dtype, parts: Parts, inexact: list[str]) -> Piece:
    """Q of a layer as the base holds it. inexact: gets the layer's name if its scales are rounded."""
    (rows, columns), quantizer = layer.plan.shape, _quantizer(layer)
    assert isinstance(quantizer, Weights), "checked before"
    scales, words = layer.backbone.parts()["scales"].shape, 32 // quantizer.bits
    shapes = {
        "weight_packed": empty((rows, -(-columns // words)), torch.int32),
        "weight_scale": empty(tuple(scales), dtype),
        "weight_shape": empty((2,), torch.int64),
    }
    if not quantizer.symmetric:
        shapes["weight_zero_point"] = empty((-(-rows // words), layer.backbone.parts()["zeros"].shape[1]), torch.int32)

    def make() -> dict[str, Tensor]:
        with parts.held(f"{name}.backbone"):
            if _rounds_scales(layer, dtype):
                inexact.append(name)
            return {f"{name}.{key}": value.cpu() for key, value in _stored(layer, dtype).items()}

    return Piece({f"{name}.{key}": shape for key, shape in shapes.items()}, make)


def _stored(layer: FactoredLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer in the base."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    quantizer, parts, shape = layer.backbone.quantizer, layer.backbone.parts(), layer.plan.shape
    codes, zeros = signed_codes(quantizer, {name: part.cpu() for name, part in parts.items()}, shape)
    found = {
        "weight_packed": pack_to_int32(codes, quantizer.bits),
        "weight_scale": parts["scales"].to(dtype),  # exact where the scales were made here: 8 significant bits
        "weight_shape": torch.tensor(shape),
    }
    if zeros is not None:
        found["weight_zero_point"] = pack_to_int32(zeros, quantizer.bits, packed_dim=0)
    return found


def _description(layers: dict[str, FactoredLinear], dense: list[str]) -> dict[str, Any]:
    """quantization_config: layers that are stored alike are one group. dense: names of the other linear layers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    alike: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, layer in layers.items():
        arguments = _arguments(layer)
        alike.setdefault(str(arguments), (arguments, []))[1].append(name)
    groups = {
        f"group_{number}": QuantizationScheme(
            targets=["Linear"] if len(alike) == 1 else names, weights=QuantizationArgs(**arguments)
        )
        for number, (arguments, names) in enumerate(alike.values())
    }
    config = QuantizationConfig(
        config_groups=groups, ignore=dense, format="pack-quantized", quantization_status="compressed"
    )
    found: dict[str, Any] = config.model_dump(mode="json")
    return found
