"""What exports for stock loaders share: a base without L and R, an ordinary LoRA adapter with them (lora_alpha == r),
and the outputs of the two in a process that never imports lord_tune."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExportMismatch, UsageError
from ..integrations.running import decoder_inputs
from ..integrations.shards import Piece, save_pieces
from ..integrations.transformers_quantizer import detach
from ..layers import FactoredLinear, factored_layers, unfused_parameters
from ..protocols import Tokenizer
from .parts import Parts

BASE, ADAPTER = "base", "adapter"
NO_ADAPTER = "no adapter was written, so that `pad_ranks` had no effect"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


def check_adapter_form(model: PreTrainedModel, form: str) -> None:
    """Refuse what no LoRA adapter can hold."""
    experts = unfused_parameters(model)
    if experts:
        raise UsageError(
            f"The experts '{experts[0]}' are decomposed, which `format` {form} cannot hold one by one; export with "
            "`format` factored or dense."
        )
    for name, layer in factored_layers(model).items():
        if layer.plan.backbone_options.get("incoherence"):
            raise UsageError(
                f"'{name}' has a rotated backbone, which a stock loader cannot decode; export with `format` factored "
                "or dense, or decompose with `incoherence` false."
            )
        if layer.bias is not None and layer.plan.method == "afm":
            raise UsageError(
                f"'{name}' has an afm bias, which a LoRA adapter cannot carry; export with `format` factored."
            )


def base_pieces(
    model: PreTrainedModel,
    layers: Mapping[str, FactoredLinear],
    parts: Parts,
    dtype: torch.dtype | None = None,  # of floating-point numbers; None: that of each
    called: Mapping[str, str] | None = None,  # names that are others in the file
) -> list[Piece]:
    """Everything but the weights of the factored layers, tensor by tensor, each let go once it is written."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}  # a tied head is stored once, as the embedding
    pieces = []
    for key, value in model.state_dict().items():
        owner = next((name for name in layers if key.startswith(name + ".")), None)
        if key in ties or (owner is not None and key != f"{owner}.bias"):
            continue
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        name = (called or {}).get(key, key)

        def make(key: str = key, name: str = name, kind: torch.dtype = kind) -> dict[str, Tensor]:
            with parts.held(key):
                return {name: parts.read(key).to("cpu", kind)}

        pieces.append(Piece({name: empty(tuple(value.shape), kind)}, make))
    return pieces


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What will be written, without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def write_base(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, pieces: Sequence[Piece], config: dict[str, Any]
) -> None:
    """A checkpoint folder. config: what comes into config.json beside the model's own."""
    folder.mkdir(exist_ok=True)
    save_pieces(folder / "model.safetensors", pieces)
    detach(model)
    merged = model.config.to_dict() | config
    merged.pop("_name_or_path", None)  # of this machine
    (folder / "config.json").write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_adapter(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    layers: Mapping[str, FactoredLinear],  # with L R
    base: Path,  # as the adapter names it
    dtype: torch.dtype = torch.float32,
    pad: bool = False,  # all ranks to one that engines take, with zeros
    parts: Parts | None = None,  # that are let go of; None: the model stays as it is
) -> None:
    """L and R as an adapter folder of PEFT."""
    folder.mkdir()
    ranks = {name: layer.rank for name, layer in layers.items()}
    largest = padded_rank(max(ranks.values())) if pad else max(ranks.values())
    parts = parts or Parts(model, keep=True)
    tokenizer.save_pretrained(folder)
    pieces = [_factors(name, layer, dtype, largest if pad else layer.rank, parts) for name, layer in layers.items()]
    save_pieces(folder / "adapter_model.safetensors", pieces)
    other = {} if pad else {name: rank for name, rank in ranks.items() if rank != largest}
    patterns = {rf"^{name}$".replace(".", r"\."): rank for name, rank in other.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.can_generate() else None,
        "base_model_name_or_path": str(base.resolve()),
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
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _factors(name: str, layer: FactoredLinear, dtype: torch.dtype, rank: int, parts: Parts) -> Piece:
    """L and R of a layer, with zeros up to `rank`."""
    keys = f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"

    def make() -> dict[str, Tensor]:
        with parts.held(*factors_of(name, layer)):
            left, right = (factor.to("cpu", dtype) for factor in layer.dense_factors())
        missing = rank - layer.rank
        left, right = nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))
        return dict(zip(keys, (right, left), strict=True))

    shapes = empty((rank, layer.in_features), dtype), empty((layer.out_features, rank), dtype)
    return Piece(dict(zip(keys, shapes, strict=True)), make)


def factors_of(name: str, layer: FactoredLinear) -> list[str]:
    """The modules that hold L and R."""
    return [f"{name}.{side}" for side in ("left", "right", "top_left", "top_right") if getattr(layer, side) is not None]


def padded_rank(largest: int) -> int:
    """The smallest rank that vLLM takes and every layer fits in."""
    fitting = [rank for rank in SERVED_RANKS if rank >= largest]
    if not fitting:
        raise UsageError(
            f"The largest rank is {largest}, and engines take at most {SERVED_RANKS[-1]}; decompose with a smaller "
            "rank, or leave `pad_ranks` out."
        )
    return fitting[0]


STOCK_LOADER = """
import sys, torch, transformers, peft
from safetensors.torch import save_file, load_file
base, adapter, ids, out, kind, how = sys.argv[1:]
transformers.logging.disable_progress_bar()
options = {
    "decode": lambda: {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)},
    "remote": lambda: {"trust_remote_code": True},
}.get(how, dict)()
model = getattr(transformers, kind).from_pretrained(base, **options).eval()
for module in model.modules():  # what is stored is compared: some CPUs multiply bitsandbytes' 4-bit weights in bfloat16
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False
inputs = {name: value.to(next(model.parameters()).device) for name, value in load_file(ids).items()}
if how == "run":
    with torch.no_grad():
        model(**{name: value[:1, :2] for name, value in inputs.items()})
if adapter:
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
assert "lord_tune" not in sys.modules
found = []
with torch.no_grad():
    for number in range(len(inputs["input_ids"])):
        result = model(**{name: value[number : number + 1] for name, value in inputs.items()})
        named = [value for key, value in result.items() if key.endswith("logits")] or [result.last_hidden_state]
        found += [value.float().reshape(-1, value.shape[-1]) for value in named]
logits = torch.cat([value for value in found if value.shape[-1] == found[0].shape[-1]])
save_file({"logits": logits.cpu().contiguous()}, out)
"""


def served_outputs(base: Path, adapter: Path, ids: Tensor, model: PreTrainedModel) -> Tensor | None:
    """The outputs of an adapter on a quantized base elsewhere; None where its package is not installed."""
    method = json.loads((base / "config.json").read_text())["quantization_config"]["quant_method"]
    needed = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}.get(method, "gptqmodel")
    if importlib.util.find_spec(needed) is None:
        return None
    how = "decode" if method == "compressed-tensors" else ""
    return _run_stock(adapter.parent, base, adapter, ids, model, type(model).__name__, how)


def stock_outputs(
    folder: Path,  # with a base and, unless no layer has L R, an adapter
    ids: Tensor,
    model: PreTrainedModel,  # what was exported, for its class and what it reads
    how: Literal["", "run", "decode"] = "",  # PEFT takes no packed layers of compressed-tensors: they are decoded when
    # they run for the first time, or when they are loaded
    remote: str | None = None,  # the Auto class that loads a model with code of its own, in `folder` itself
) -> Tensor:
    """The outputs of stock transformers + peft in a process that never imports lord_tune."""
    adapter = folder / ADAPTER
    base, kind = (folder / BASE, type(model).__name__) if remote is None else (folder, remote)
    told = how if remote is None else "remote"
    return _run_stock(folder, base, adapter if adapter.is_dir() else None, ids, model, kind, told)


def run_stock_loader(words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the program above in a process of its own."""
    run = subprocess.run([sys.executable, "-c", STOCK_LOADER, *words], capture_output=True, text=True)
    return run.returncode, run.stderr


def _run_stock(
    folder: Path, base: Path, adapter: Path | None, ids: Tensor, model: PreTrainedModel, kind: str, how: str
) -> Tensor:
    """folder: where files may be put for a while."""
    scratch = folder / ".verify"
    scratch.mkdir()
    try:
        inputs = {"input_ids": ids.contiguous(), **decoder_inputs(model, ids)}
        save_file(inputs, scratch / "ids.safetensors")
        words = [str(base), "" if adapter is None else str(adapter), str(scratch / "ids.safetensors")]
        words += [str(scratch / "out.safetensors"), kind, how]
        code, said = run_stock_loader(words)
        if code != 0:
            last = said.strip().splitlines()[-1] if said.strip() else "no message"
            raise ExportMismatch(f"Stock transformers + peft could not load the written checkpoint: {last}")
        return load_file(scratch / "out.safetensors")["logits"]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
