"""Export as a bitsandbytes NF4 base holding Q and an ordinary LoRA adapter holding L and R (lora_alpha == r)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..layers import factored_layers, is_linear
from ..quantizers import NF4
from .base import Job
from .stock import ADAPTER, BASE, NO_ADAPTER, base_state, check_adapter_form, stock_outputs, write_adapter, write_base


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
        layers = factored_layers(model)
        state = base_state(model, layers)
        double_quant = False
        for name, layer in layers.items():
            quantizer = layer.backbone.quantizer
            assert isinstance(quantizer, NF4), "checked before"
            double_quant = quantizer.double_quant
            packed = quantizer.state(layer.backbone.parts(), layer.plan.shape, torch.float32).as_dict(packed=True)
            state[f"{name}.weight"] = layer.backbone.weight.detach().cpu()
            for key, value in packed.items():
                state[f"{name}.weight.{key}"] = value.detach().cpu().clone()
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
        write_base(model, job.tokenizer, job.folder / BASE, state, {"quantization_config": quantization})
        ranked = {name: layer for name, layer in layers.items() if layer.rank}
        if job.pad_ranks and not ranked:
            job.notes.append(NO_ADAPTER)
        if ranked:
            write_adapter(model, job.tokenizer, job.folder / ADAPTER, ranked, base, pad=job.pad_ranks)
        return stock_outputs(job.folder, job.ids, model)

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch.")]
