"""Export as a bitsandbytes NF4 base holding Q and an ordinary LoRA adapter holding L and R (lora_alpha == r)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integrations.shards import Piece
from ..layers import FactoredLinear, factored_layers, is_linear
from ..quantizers import NF4
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
class PeftExport:
    """An NF4 base and an ordinary LoRA adapter, for stock loaders."""

    name: ClassVar[str] = "peft"
    model_folder: ClassVar[str] = BASE

    def check(self, model: PreTrainedModel) -> None:
        check_adapter_form(model, self.name)
        for name, layer in factored_layers(model).items():
            if layer.plan.backbone != "nf4":
                raise UsageError(
                    f"`format` peft needs an NF4 backbone; '{name}' has backbone {layer.plan.backbone}, whose LoRA "
                    "base would be dense zeros. Export with `format` factored or dense."
                )
            if layer.plan.backbone_options.get("block_size", 64) != 64:
                raise UsageError("transformers loads NF4 bases of block size 64 only; export with `format` factored.")
            if layer.in_features % 64:
                raise UsageError(
                    f"'{name}' has {layer.in_features} inputs, not a multiple of 64; bitsandbytes decodes such a base "
                    "wrongly on some CPUs. Export with `format` factored or dense."
                )

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        layers, parts = factored_layers(model), Parts(model, job.store)
        pieces = base_pieces(model, layers, parts)
        pieces += [_codes(name, layer, parts) for name, layer in layers.items()]
        double_quant = False
        for layer in layers.values():
            assert isinstance(layer.backbone.quantizer, NF4), "checked before"
            double_quant = layer.backbone.quantizer.double_quant
        dense_left = [n for n, m in model.named_modules() if is_linear(m)]
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_use_double_quant": double_quant,
            "llm_int8_skip_modules": sorted({*dense_left, "lm_head"} - set(layers)),
        }
        base = job.final / BASE
        write_base(model, job.tokenizer, job.folder / BASE, pieces, {"quantization_config": quantization})
        ranked = {name: layer for name, layer in layers.items() if layer.rank}
        if job.pad_ranks and not ranked:
            job.notes.append(NO_ADAPTER)
        if ranked:
            write_adapter(model, job.tokenizer, job.folder / ADAPTER, ranked, base, pad=job.pad_ranks, parts=parts)
        return stock_outputs(job.folder, job.ids, model)

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch.")]


def _codes(name: str, layer: FactoredLinear, parts: Parts) -> Piece:
    """Q of a layer as bitsandbytes stores it. The length of its description depends on a number of its own."""

    def stored(found: dict[str, Tensor]) -> dict[str, Tensor]:
        quantizer = layer.backbone.quantizer
        assert isinstance(quantizer, NF4), "checked before"
        state = quantizer.state(found, layer.plan.shape, torch.float32).as_dict(packed=True)
        packed = {f"{name}.weight.{key}": value.detach().cpu().clone() for key, value in state.items()}
        return {f"{name}.weight": found["weight"].cpu()} | packed

    def make() -> dict[str, Tensor]:
        with parts.held(f"{name}.backbone"):
            return stored(layer.backbone.parts())

    found = {key: torch.empty_like(part, device="cpu") for key, part in layer.backbone.parts().items()}
    if "nested_offset" in found:
        found["nested_offset"] = parts.read(f"{name}.backbone.nested_offset").cpu()
    return Piece({key: empty(tuple(value.shape), value.dtype) for key, value in stored(found).items()}, make)
