"""Export as a bitsandbytes NF4 base holding Q and an ordinary LoRA adapter holding L and R (lora_alpha == r)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ExportMismatch, UsageError
from ..integrations.transformers_quantizer import detach
from ..layers import factored_layers, is_linear, unfused_parameters
from ..protocols import Tokenizer
from ..quantizers import NF4
from .base import Job


def check_peft_exportable(model: PreTrainedModel) -> None:
    experts = unfused_parameters(model)
    if experts:
        raise UsageError(
            f"The experts '{experts[0]}' are decomposed, which neither bitsandbytes nor a LoRA adapter can hold one by "
            "one; export with `format` factored or dense."
        )
    for name, layer in factored_layers(model).items():
        if layer.plan.backbone != "nf4":
            raise UsageError(
                f"`format` peft needs an NF4 backbone; '{name}' has backbone {layer.plan.backbone}, whose LoRA base "
                "would be dense zeros. Export with `format` factored or dense."
            )
        if layer.plan.backbone_options.get("incoherence"):
            raise UsageError(
                f"'{name}' has a rotated backbone, which bitsandbytes cannot decode; export with another `format`."
            )
        if layer.bias is not None and layer.plan.method == "afm":
            raise UsageError(
                f"'{name}' has an afm bias, which a LoRA adapter cannot carry; export with `format` factored."
            )
        if layer.plan.backbone_options.get("block_size", 64) != 64:
            raise UsageError("transformers loads NF4 bases of block size 64 only; export with `format` factored.")
        if layer.in_features % 64:
            raise UsageError(
                f"'{name}' has {layer.in_features} inputs, not a multiple of 64; bitsandbytes decodes such a base "
                "wrongly on some CPUs. Export with `format` factored or dense."
            )


def write_peft(factored: PreTrainedModel, tokenizer: Tokenizer, folder: Path, ids: Tensor, final: Path) -> Tensor:
    layers = factored_layers(factored)
    ranks = {name: layer.rank for name, layer in layers.items()}
    largest = max(ranks.values())
    state: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, layer in layers.items():
        left, right = (factor.float().cpu().contiguous() for factor in layer.dense_factors())
        adapter[f"base_model.model.{name}.lora_A.weight"] = right
        adapter[f"base_model.model.{name}.lora_B.weight"] = left
    names = set(layers)
    for key, value in factored.state_dict().items():
        owner = next((n for n in names if key.startswith(n + ".")), None)
        if owner is None or key == f"{owner}.bias":
            state[key] = value.detach().cpu()
    double_quant = False
    for name, layer in layers.items():
        quantizer = layer.backbone.quantizer
        assert isinstance(quantizer, NF4), "checked before"
        double_quant = quantizer.double_quant
        packed = quantizer.state(layer.backbone.parts(), layer.plan.shape, torch.float32).as_dict(packed=True)
        state[f"{name}.weight"] = layer.backbone.weight.detach().cpu()
        for key, value in packed.items():
            state[f"{name}.weight.{key}"] = value.detach().cpu().clone()
    base, lora = folder / "base", folder / "adapter"
    base.mkdir()
    lora.mkdir()
    _drop_tied(factored, state)
    save_file({k: v.contiguous() for k, v in state.items()}, base / "model.safetensors", metadata={"format": "pt"})
    dense_left = [n for n, m in factored.named_modules() if is_linear(m)]
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_skip_modules": sorted({*dense_left, "lm_head"} - names),
    }
    detach(factored)
    config = factored.config.to_dict() | {"quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if getattr(factored, "generation_config", None) is not None and factored.can_generate():
        factored.generation_config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(lora)
    save_file(adapter, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    patterns = {rf"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items() if rank != largest}
    lora_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if factored.can_generate() else None,
        "base_model_name_or_path": str((final / "base").resolve()),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (lora / "adapter_config.json").write_text(json.dumps(lora_config, indent=2) + "\n")
    return _stock_outputs(base, lora, ids, type(factored).__name__)


def _drop_tied(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """A tied head is stored once, under its embedding's name."""
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)


_STOCK_LOADER = """
import sys, torch, transformers, peft
from safetensors.torch import save_file, load_file
base, adapter, ids, out, kind = sys.argv[1:]
transformers.logging.disable_progress_bar()
model = getattr(transformers, kind).from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
assert "lord_tune" not in sys.modules
windows = load_file(ids)["ids"].to(next(model.parameters()).device)
found = []
with torch.no_grad():
    for window in windows:
        result = model(input_ids=window[None])
        named = [value for key, value in result.items() if key.endswith("logits")] or [result.last_hidden_state]
        found += [value.float().reshape(-1, value.shape[-1]) for value in named]
logits = torch.cat([value for value in found if value.shape[-1] == found[0].shape[-1]])
save_file({"logits": logits.cpu().contiguous()}, out)
"""


def _stock_outputs(base: Path, adapter: Path, ids: Tensor, kind: str) -> Tensor:
    """The outputs of stock transformers + peft in a process that never imports lord_tune."""
    scratch = base.parent / ".verify"
    scratch.mkdir()
    try:
        save_file({"ids": ids}, scratch / "ids.safetensors")
        words = [str(base), str(adapter), str(scratch / "ids.safetensors"), str(scratch / "out.safetensors"), kind]
        run = subprocess.run([sys.executable, "-c", _STOCK_LOADER, *words], capture_output=True, text=True)
        if run.returncode != 0:
            last = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no message"
            raise ExportMismatch(f"Stock transformers + peft could not load the written checkpoint: {last}")
        return load_file(scratch / "out.safetensors")["logits"]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class PeftExport:
    """An NF4 base and an ordinary LoRA adapter, for stock loaders."""

    name: ClassVar[str] = "peft"
    model_folder: ClassVar[str] = "base"

    def check(self, model: PreTrainedModel) -> None:
        check_peft_exportable(model)

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        return write_peft(model, job.tokenizer, job.folder, job.ids, job.final)

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch.")]
