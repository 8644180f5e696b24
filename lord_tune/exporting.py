"""Write a factored model (or one with a trained adapter) in another form, reload what was written, compare logits.

dense: an ordinary Hugging Face checkpoint, W = Q + L R per layer, any loader.
factored: the adapter folded back into L and R, exactly; needs lord_tune to load.
peft: a bitsandbytes NF4 base holding Q and an ordinary LoRA adapter holding L and R with lora_alpha == r; loads with
  stock transformers + peft, without lord_tune. Only for an NF4 backbone: LoRD has no Q, its base would be zeros.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ExportMismatch, UsageError
from .integrations.models import DTYPE_NAMES, load_dense_or_factored, max_length, save_model
from .integrations.peft_adapters import fold, mode_of
from .integrations.transformers_quantizer import attach, detach
from .layers import densify, factored_layers, is_linear
from .quantizers import NF4

FORMATS = ("dense", "factored", "peft")
# KL in nats per token between unmerged and written model; float32 differs in the order of summation only,
# 16-bit weights by their rounding (relative 2^-9 for bfloat16 on every weight)
THRESHOLDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PROBE_TOKENS = 256
PROBE_TEXT = '''def moving_average(values, width):
    """Return the mean of each window of `width` consecutive values."""
    if width < 1:
        raise ValueError("width must be at least 1")
    total, result = sum(values[:width]), []
    for old, new in zip(values, values[width:] + [0]):
        result.append(total / width)
        total += new - old
    return result


The lighthouse keeper climbed the stairs every evening, counting the steps aloud, and wrote the weather of the day into
a book that nobody had asked him to keep. In winter the wind came from the north and the ink froze in its glass.
'''


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Unmerged against written model on the probe text."""

    kl: float  # mean KL(unmerged || written), nats per token
    max_logit_difference: float
    top1_agreement: float
    tokens: int


def probe_ids(tokenizer: Any, text: str | None, longest: int = PROBE_TOKENS) -> Tensor:
    """(1, length) ids of the comparison text, at most `longest`."""
    ids = tokenizer(PROBE_TEXT if text is None else text, verbose=False)["input_ids"][:longest]
    if len(ids) < 2:
        raise UsageError(f"The comparison text has {len(ids)} tokens; at least 2 are needed.")
    return torch.tensor([ids])


@torch.no_grad()
def outputs_of(model: Any, ids: Tensor) -> Tensor:
    """Logits, or last hidden states of a model without a head; (length, width) float32 on the CPU."""
    result = model.eval()(input_ids=ids.to(next(model.parameters()).device))
    logits = result.logits if "logits" in result else result.last_hidden_state
    return logits[0].float().cpu()


def compare(reference: Tensor, written: Tensor) -> Comparison:
    """Both (token, vocabulary)."""
    p, q = reference.double().log_softmax(-1), written.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))
    agreement = float((reference.argmax(-1) == written.argmax(-1)).double().mean())
    return Comparison(kl, float((reference - written).abs().max()), agreement, reference.shape[0])


def export_model(
    model: Any,
    tokenizer: Any,
    folder: Path,  # empty, exists; becomes the export
    form: str,
    dtype: str = "float32",
    threshold: float | None = None,
    text: str | None = None,
    final: Path | None = None,  # where `folder` will be moved
    card: Callable[[str], str] | None = None,  # format -> README text
) -> Comparison:
    """Write `model` as `form` into `folder` and verify it; raises ExportMismatch over the threshold.

    The model is consumed: its adapter is folded and, for `dense`, its layers are replaced.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form} is unknown; use one of {', '.join(FORMATS)}.")
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype {dtype} is unknown; use one of {', '.join(DTYPE_NAMES)}.")
    plain = model.get_base_model() if mode_of(model) else model
    if not factored_layers(plain):
        raise UsageError("The model has no factored layers; it is an ordinary checkpoint already.")
    if form == "peft":
        _check_peft_exportable(plain)
    model_dtype = plain.dtype
    ids = probe_ids(tokenizer, text, min(PROBE_TOKENS, max_length(plain)))
    reference = outputs_of(model, ids)
    factored = fold(model) if mode_of(model) else model
    if form == "dense":
        written = _write_dense(factored, tokenizer, folder, DTYPE_NAMES[dtype], ids)
    elif form == "factored":
        attach(factored)
        save_model(factored, tokenizer, folder)
        written = outputs_of(load_dense_or_factored(str(folder)), ids)
    else:
        written = _write_peft(factored, tokenizer, folder, ids, final or folder)
    if card is not None:
        (folder / "README.md").write_text(card(form))
    comparison = compare(reference, written)
    # `factored` keeps every dtype and is exact; the others compute in another dtype than a 16-bit model
    computed = [] if form == "factored" else [str(model_dtype).removeprefix("torch."), dtype if form == "dense" else ""]
    limit = max(THRESHOLDS.get(name, 0.0) for name in ["float32", *computed]) if threshold is None else threshold
    if not math.isfinite(comparison.kl) or comparison.kl > limit:
        raise ExportMismatch(
            f"The written {form} checkpoint differs from the model: KL {comparison.kl:.3g} nats per token, at most "
            f"{limit:.3g} wanted (largest logit difference {comparison.max_logit_difference:.3g}). Nothing was kept; "
            "try --dtype float32, or raise --threshold if this loss is acceptable."
        )
    return comparison


def _write_dense(factored: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    expected = {name for name, layer in factored_layers(factored).items() if layer.bias is not None}
    densify(factored, dtype)
    detach(factored)
    factored.to(dtype)
    factored.config.dtype = dtype
    save_model(factored, tokenizer, folder)
    reloaded = load_dense_or_factored(str(folder))
    for name in expected:
        if getattr(reloaded.get_submodule(name), "bias", None) is None:
            raise UsageError(
                f"'{name}' carries a bias (method afm) and {type(reloaded).__name__} has no place for one, so a dense "
                "checkpoint would lose it; export --format factored, or decompose with --method whitened."
            )
    return outputs_of(reloaded, ids)


def _check_peft_exportable(model: Any) -> None:
    for name, layer in factored_layers(model).items():
        if layer.plan.backbone != "nf4":
            raise UsageError(
                f"--format peft needs an NF4 backbone; '{name}' has backbone {layer.plan.backbone}, whose LoRA base "
                "would be dense zeros. Export --format factored or dense."
            )
        if layer.plan.backbone_options.get("incoherence"):
            raise UsageError(
                f"'{name}' has a rotated backbone, which bitsandbytes cannot decode; export another format."
            )
        if layer.bias is not None and layer.plan.method == "afm":
            raise UsageError(f"'{name}' has an afm bias, which a LoRA adapter cannot carry; export --format factored.")
        if layer.plan.backbone_options.get("block_size", 64) != 64:
            raise UsageError("transformers loads NF4 bases of block size 64 only; export --format factored.")
        if layer.in_features % 64:
            raise UsageError(
                f"'{name}' has {layer.in_features} inputs, not a multiple of 64; bitsandbytes decodes such a base "
                "wrongly on some CPUs. Export --format factored or dense."
            )


def _write_peft(factored: Any, tokenizer: Any, folder: Path, ids: Tensor, final: Path) -> Tensor:
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


def _drop_tied(model: Any, state: dict[str, Tensor]) -> None:
    """A tied head is stored once, under its embedding's name."""
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)


_STOCK_LOADER = """
import sys, torch, transformers, peft
from safetensors.torch import save_file, load_file
base, adapter, ids, out, kind = sys.argv[1:]
transformers.logging.disable_progress_bar()
model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32).eval()
for module in model.modules():
    # on CPUs with AVX512-BF16 bitsandbytes would round the block scales to bfloat16 at the first evaluation
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = peft.PeftModel.from_pretrained(model, adapter).eval()
assert "lord_tune" not in sys.modules
with torch.no_grad():
    result = model(input_ids=load_file(ids)["ids"].to(next(model.parameters()).device))
logits = result.logits if "logits" in result else result.last_hidden_state
save_file({"logits": logits[0].float().cpu().contiguous()}, out)
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
