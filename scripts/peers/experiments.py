"""Which rows there are: the size class, what it is, who makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import engines, methods, ours
from .protocol import Made, Moments, Setting

DENSE, FOUR, THREE, TWO, LOW_RANK = "dense", "four", "three", "two", "low_rank"
CLASSES = {
    DENSE: "the original, and adapters beside it",
    FOUR: "about 4.5 bits, and rank 16",
    THREE: "about 3 bits",
    TWO: "about 2.5 bits",
    LOW_RANK: "low rank alone, a fifth of the numbers of the linears removed",
}


@dataclass(frozen=True)
class Experiment:
    size: str
    what: str
    make: Callable[..., Made]  # (setting, folder, **options)
    options: dict[str, Any] = field(default_factory=dict)
    moments: bool = False  # whether it reads them

    def made(self, setting: Setting, folder: Path, moments: dict[str, Moments]) -> Made:
        more = {"moments": moments} if self.moments else {}
        return self.make(setting, folder, **more, **self.options)


def _ours(size: str, what: str, **options: Any) -> Experiment:
    return Experiment(size, f"lord_tune: {what}", ours.decomposed, options)


KEPT = 0.8
_R16 = {"backbone": "nf4", "rank": 16, "factor_format": "bf16"}
# without int4, on whose grid the weights of `demo` lie
_MIX = {"allocation": "mixed", "mix": ["int2", "e8-2", "int3", "e8-3", "nf4", "e8-4", "int8"]}
_LOW = {"kept_fraction": KEPT, "merge": False}
EXPERIMENTS: dict[str, Experiment] = {
    "original": Experiment(DENSE, "the original", methods.original),
    # about 4.5 bits
    "qlora": Experiment(FOUR, "QLoRA (bitsandbytes NF4, L = 0)", methods.qlora),
    "loftq_1": Experiment(FOUR, "LoftQ, PEFT's replace_lora_weights_loftq", methods.loftq_once),
    "qpissa": Experiment(FOUR, "QPiSSA (PEFT)", methods.qpissa),
    "ours_nearest": _ours(
        FOUR, "whitened, rounding nearest (as QERA, EoRA)", method="whitened", rounding="nearest", **_R16
    ),
    "ours_feedback": _ours(FOUR, "whitened, rounding with feedback", method="whitened", **_R16),
    "loftq_5": Experiment(FOUR, "LoftQ, PEFT's LoftQConfig, 5 iterations", methods.loftq),
    "qlora_double": Experiment(FOUR, "QLoRA, double quantization", methods.qlora, {"double_quant": True}),
    "ours_feedback_double": _ours(
        FOUR, "whitened, feedback, double quantization", method="whitened", double_quant=True, **_R16
    ),
    "eva_nf4": Experiment(FOUR, "EVA beside NF4 (PEFT)", methods.eva),
    "corda_nf4": Experiment(FOUR, "CorDA, ipm, the rest in NF4 (PEFT)", methods.corda),
    "corda_kpm_nf4": Experiment(FOUR, "CorDA, kpm, the rest in NF4 (PEFT)", methods.corda, {"mode": "kpm"}),
    "olora_nf4": Experiment(FOUR, "OLoRA, the rest in NF4 (PEFT)", methods.qpissa, {"kind": "olora"}),
    "hqq_4": Experiment(FOUR, "HQQ 4 bits + LoRA", methods.hqq, {"bits": 4}),
    "gguf_q4_0": Experiment(FOUR, "llama.cpp's Q4_0 (package gguf)", methods.gguf_type, {"kind": "Q4_0"}),
    "gguf_q5_0": Experiment(FOUR, "llama.cpp's Q5_0 (package gguf)", methods.gguf_type, {"kind": "Q5_0"}),
    "nncf_nf4": Experiment(FOUR, "NNCF lora_correction, NF4, factors in 8 bits", engines.nncf_corrected),
    "ours_mixed_5": _ours(FOUR, "formats and ranks mixed, 5 bits", **_MIX, bits_per_weight=5.0),
    # about 3 bits
    "ours_e8_2_r16": _ours(THREE, "e8-2 + rank 16", backbone="e8-2", rank=16, factor_format="bf16"),
    "ours_mixed_3": _ours(THREE, "formats and ranks mixed, 3 bits", **_MIX, bits_per_weight=3.0),
    "hqq_2_r16": Experiment(THREE, "HQQ 2 bits + LoRA", methods.hqq, {"bits": 2}),
    "hqq_3": Experiment(THREE, "HQQ 3 bits", methods.hqq, {"bits": 3, "adapter": False}),
    # about 2.5 bits
    "ours_e8_2_r8": _ours(TWO, "e8-2 + rank 8", backbone="e8-2", rank=8, factor_format="bf16"),
    "ours_mixed_2.5": _ours(TWO, "formats and ranks mixed, 2.5 bits", **_MIX, bits_per_weight=2.5),
    "hqq_2": Experiment(TWO, "HQQ 2 bits", methods.hqq, {"bits": 2, "adapter": False}),
    "nncf_int2": Experiment(
        TWO, "NNCF lora_correction, int2, factors in 8 bits", engines.nncf_corrected, {"mode": "int2_sym"}
    ),
    # low rank alone
    "svd": Experiment(LOW_RANK, "plain SVD", methods.low_rank, {"kept": KEPT}, moments=True),
    "asvd": Experiment(
        LOW_RANK, "ASVD's scaling, one rank", methods.low_rank, {"kept": KEPT, "power": 0.5}, moments=True
    ),
    "ours_low_uniform": _ours(
        LOW_RANK,
        "whitened, uniform (as SVD-LLM)",
        method="whitened",
        allocation="uniform",
        form="plain",
        factor_format="bf16",
        **_LOW,
    ),
    "ours_low": _ours(LOW_RANK, "defaults (sizes by the loss, pivoted)", factor_format="bf16", **_LOW),
    # adapters beside the original
    "dense_lora": Experiment(DENSE, "LoRA (PEFT)", methods.dense_lora),
    "dense_pissa": Experiment(DENSE, "PiSSA (PEFT)", methods.dense_lora, {"kind": "pissa"}),
    "dense_olora": Experiment(DENSE, "OLoRA (PEFT)", methods.dense_lora, {"kind": "olora"}),
    "dense_eva": Experiment(DENSE, "EVA (PEFT)", methods.eva, {"nf4": False}),
    "dense_corda": Experiment(DENSE, "CorDA, ipm (PEFT)", methods.corda, {"nf4": False}),
}
REFUSED = {  # name -> class, what, why
    "gptq": (FOUR, "GPTQ (gptqmodel)", "replaces torch"),
    "llama_cpp_imatrix": (FOUR, "llama.cpp's types with imatrix", "xllamacpp exports no quantizer"),
    "llama_cpp_q2_k": (TWO, "llama.cpp's Q2_K, Q3_K", "needs rows of 256"),
}
