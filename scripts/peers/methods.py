"""What stands beside lord_tune, from its own packages: bitsandbytes, PEFT, HQQ, gguf; low rank alone is computed here.

Every function takes the setting and a folder, and returns what it made. All adapters have the same rank, scaling 1
(lora_alpha == r) and no dropout, and are kept in bfloat16, to which `protocol.stored_state` rounds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils import loftq_utils
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .protocol import Made, Moments, Setting, adapter_of, dense_linears, ready, stored_state

# --- the parts ---


def lora(setting: Setting, kind: Any = True, targets: str | list[str] = "all-linear", **given: Any) -> LoraConfig:
    return LoraConfig(
        r=setting.rank,
        lora_alpha=setting.rank,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=kind,
        **given,
    )


def nf4_base(source: str | Path, folder: Path, double_quant: bool) -> tuple[Any, Path]:
    """The model with NF4 linears, and its file as transformers writes it."""
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=form, dtype=torch.float32)
    ready(model)
    model.save_pretrained(folder / "base", save_original_format=False)
    return model, folder / "base" / "model.safetensors"


def kept_adapter(model: Any, folder: Path) -> Path:
    stored_state(model)
    path = folder / "adapter.safetensors"
    save_file({name: value.bfloat16().contiguous() for name, value in get_peft_model_state_dict(model).items()}, path)
    return path


def adapted(files: list[Path], model: Any, folder: Path, merged: str) -> Made:
    """files: of the base. merged: what PEFT's own merge does to this base."""
    return Made(model, [*files, kept_adapter(model, folder)], True, lambda m: m.merge_and_unload(), merged)


INTO_NF4 = "PEFT's merge, into NF4 again"
EXACT = "PEFT's merge, exact"


def calibration_batches(setting: Setting) -> list[dict[str, Tensor]]:
    windows = setting.windows(setting.calibration, setting.calibration_tokens)
    return [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None], "labels": w[None]} for w in windows]


# --- beside NF4 ---


def original(setting: Setting, folder: Path) -> Made:
    return Made(setting.dense(), [*Path(setting.source).glob("*.safetensors")])


def qlora(setting: Setting, folder: Path, double_quant: bool = False) -> Made:
    base, file = nf4_base(setting.source, folder, double_quant)
    return adapted([file], get_peft_model(base, lora(setting)), folder, INTO_NF4)


def eva(setting: Setting, folder: Path, nf4: bool = True) -> Made:
    """Right singular vectors of the inputs as A, B = 0. rho 1: every layer keeps the rank."""
    base, file = nf4_base(setting.source, folder, False) if nf4 else (setting.dense(), None)
    model = get_peft_model(base, lora(setting, "eva", eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(model, calibration_batches(setting), show_progress_bar=False)
    return adapted([file], model, folder, INTO_NF4) if file else dense_adapted(model, setting, folder)


def loftq_once(setting: Setting, folder: Path) -> Made:
    """PEFT's `replace_lora_weights_loftq`: the residual of a loaded NF4 model, one iteration."""
    base, file = nf4_base(setting.source, folder, False)
    model = get_peft_model(base, lora(setting))
    with on_cpu(loftq_utils._loftq_init_new, loftq_utils):
        loftq_utils.replace_lora_weights_loftq(model, model_path=str(setting.source))
    return adapted([file], model, folder, INTO_NF4)


def loftq(setting: Setting, folder: Path, iterations: int = 5) -> Made:
    """PEFT's `LoftQConfig`. What it leaves in the base lies on NF4's grid and is stored there."""
    config = lora(setting, "loftq", loftq_config={"loftq_bits": 4, "loftq_iter": iterations})
    with on_cpu(loftq_utils.loftq_init, loftq_utils, lora_layer):
        model = get_peft_model(setting.dense(), config)
    return stored_in_nf4(model, setting, folder)


@contextmanager
def on_cpu(function: Callable[..., Any], *modules: Any) -> Iterator[None]:
    """PEFT's LoftQ moves every weight to "cuda" and has no way around it; this is its own text with "cpu" instead."""
    text = inspect.getsource(function)
    changed = text.replace('else "cuda"', 'else "cpu"')
    assert changed != text, f"{function.__name__} of this PEFT no longer chooses cuda; call it as it is"
    scope = dict(vars(loftq_utils))
    exec(changed, scope)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, function.__name__, scope[function.__name__]))
        yield


def qpissa(setting: Setting, folder: Path, kind: str = "pissa") -> Made:
    """PEFT's initialisation of the original; what the adapter leaves of the weights is stored in NF4."""
    return stored_in_nf4(get_peft_model(setting.dense(), lora(setting, kind)), setting, folder)


def corda(setting: Setting, folder: Path, mode: str = "ipm", nf4: bool = True) -> Made:
    """The components of W with the largest (ipm) or smallest (kpm) effect on the calibration text are the adapter."""
    base = setting.dense()
    names = sorted({name.rpartition(".")[2] for name in dense_linears(base)})  # it reads no "all-linear"
    config = lora(setting, "corda", targets=names, corda_config=CordaConfig(corda_method=mode))

    @torch.no_grad()
    def run() -> None:
        for batch in calibration_batches(setting):
            base.base_model(input_ids=batch["input_ids"])

    preprocess_corda(base, config, run_model=run)
    model = get_peft_model(base, config)
    return stored_in_nf4(model, setting, folder) if nf4 else dense_adapted(model, setting, folder)


def stored_in_nf4(model: Any, setting: Setting, folder: Path) -> Made:
    """A and B as they are beside what they leave of the weights, rounded by bitsandbytes."""
    state = {name: value.detach().clone() for name, value in adapter_of(model).items()}
    rest = model.unload()
    rest.save_pretrained(folder / "rest")
    del model, rest
    base, file = nf4_base(folder / "rest", folder, False)
    fresh = get_peft_model(base, lora(setting, False))
    with torch.no_grad():
        for name, value in adapter_of(fresh).items():
            value.copy_(state[name])
    for path in (folder / "rest").glob("*.safetensors"):  # as large as the original
        path.unlink()
    return adapted([file], fresh, folder, INTO_NF4)


# --- beside the original ---


def dense_lora(setting: Setting, folder: Path, kind: Any = True) -> Made:
    return dense_adapted(get_peft_model(setting.dense(), lora(setting, kind)), setting, folder)


def dense_adapted(model: Any, setting: Setting, folder: Path) -> Made:
    """A base that an initialisation changed is as large as the original, whose file stands for it."""
    return adapted([*Path(setting.source).glob("*.safetensors")], model, folder, EXACT)


# --- low rank alone ---


def low_rank(setting: Setting, folder: Path, moments: Mapping[str, Moments], kept: float, power: float = 0.0) -> Made:
    """W ≈ L R of the rank that keeps the fraction `kept` of the numbers, in every layer.

    power 0: plain SVD. power 0.5: ASVD's scaling (Yuan et al. 2023, arXiv:2312.05821, by the description of its code in
    our notes): the SVD of W diag(s), s = mean|x|^power, and R diag(s)⁻¹; without its search for the ranks.
    """
    model = setting.dense()
    model.requires_grad_(False)
    for name, layer in dense_linears(model).items():
        weight = layer.weight.detach()
        rank = max(1, int(kept * weight.numel() / sum(weight.shape)))
        scale = moments["calibrated"].magnitude(name).clamp_min(1e-6) ** power
        u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
        root = s[:rank].sqrt()
        left, right = nn.Linear(rank, weight.shape[0], layer.bias is not None), nn.Linear(weight.shape[1], rank, False)
        left.weight.data, right.weight.data = u[:, :rank] * root, root[:, None] * vh[:rank] / scale
        if layer.bias is not None:
            left.bias.data, left.bias.requires_grad = layer.bias.detach(), False
        model.set_submodule(name, nn.Sequential(right, left))
    return Made(model, [kept_factors(model, folder)], True)


def kept_factors(model: Any, folder: Path) -> Path:
    """The factors in 16 bits, the other tensors as they are; a tied head once."""
    stored_state(model)
    path, trained = folder / "model.safetensors", adapter_of(model)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    save_file({k: (v.bfloat16() if k in trained else v).contiguous() for k, v in tensors.items()}, path)
    return path


# --- other roundings ---


def hqq(setting: Setting, folder: Path, bits: int, group: int = 64, adapter: bool = True) -> Made:
    """HQQ's own layers, scales and zeros kept in 16 bits; PEFT's LoRA on them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = setting.dense()
    model.requires_grad_(False)
    kept: dict[str, Tensor] = {}
    linears = dense_linears(model)
    for name, layer in linears.items():
        form = BaseQuantizeConfig(nbits=bits, group_size=group)
        rounded = HQQLinear(layer, form, compute_dtype=torch.float32, device="cpu", del_orig=False)
        for key in ("scale", "zero"):
            short = rounded.meta[key].half()
            rounded.meta[key], kept[f"{name}.{key}"] = short.float(), short
        kept[f"{name}.W_q"] = rounded.W_q.data
        model.set_submodule(name, rounded)
    kept |= {name: value.detach() for name, value in model.named_parameters() if not _inside(name, linears)}
    file = folder / "base.safetensors"
    save_file({name: value.contiguous() for name, value in kept.items()}, file)
    if not adapter:
        return Made(model, [file])
    names = sorted({name.rpartition(".")[2] for name in linears})  # "all-linear" does not see HQQ's layers
    wrapped = get_peft_model(model, lora(setting, targets=names))
    return adapted([file], wrapped, folder, "PEFT's merge, into HQQ again")


def _inside(name: str, linears: Mapping[str, Any]) -> bool:
    return any(name.startswith(layer + ".") for layer in linears) and not name.endswith(".bias")


def gguf_type(setting: Setting, folder: Path, kind: str) -> Made:
    """llama.cpp's type of the linears as the package gguf rounds to it (nearest, no imatrix), decoded."""
    import gguf

    model, form = setting.dense(), gguf.GGMLQuantizationType[kind]
    kept: dict[str, Tensor] = {}
    linears = dense_linears(model)
    for name, layer in linears.items():
        codes = gguf.quants.quantize(layer.weight.detach().numpy(), form)
        layer.weight.data = torch.from_numpy(gguf.quants.dequantize(codes, form))
        kept[f"{name}.codes"] = torch.from_numpy(codes)
    kept |= {name: value.detach() for name, value in model.named_parameters() if not _inside(name, linears)}
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in kept.items()}, file)
    return Made(model, [file])
