"""What a training run is told: its options, and trl's arguments with our defaults.

Defaults that differ from trl's: learning rates fit for factors (1e-4) and for LoRA on them (2e-4; trl's 2e-5 is one for
full fine-tuning; a tenth of ours for dpo), float32 on CPUs (trl's bfloat16 default fails or is up to 134 times slower
there), one epoch, reporting to those of TensorBoard and Trackio that are installed: both keep what they get on this
machine. Everything else is trl's, under trl's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.attach import BASIS, FACTORS, LORA, SCALES, SPLIT
from ..errors import UsageError
from ..integrations.models import default_device

if TYPE_CHECKING:
    from ..protocols import TrlConfig

LEARNING_RATES = {FACTORS: 1e-4, SPLIT: 1e-4, LORA: 2e-4, SCALES: 1e-2, BASIS: 1e-3}
SFT, DISTILL, DPO = "sft", "distill", "dpo"
_TRACKERS = ("tensorboard", "trackio")
_SWITCHED = {"on": "true", "off": "false"}  # words of YAML that transformers' parser does not know
_UNUSED = {DISTILL: ("loss_type", "label_smoothing_factor", "router_aux_loss_coef")}  # parts of the loss of sft


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What is trained on what; the optimiser's and the loop's settings are trl's own."""

    model_name_or_path: str
    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    plain_prompts: bool = False
    mode: str = FACTORS
    lora_r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_on: str = "both"
    scales_on: str = "components"
    basis_share: float | None = None
    basis_kept_fraction: float | None = None
    basis_max_bytes: str | None = None
    basis_new: int = 32
    basis_start: float = 1 / 3
    basis_every: int = 50
    targets: str | None = None
    objective: str = SFT
    teacher_model_name_or_path: str | None = None
    teacher_logits: str | None = None
    teacher_top_k: int = 64
    distill_ce_weight: float = 0.0
    distill_temperature: float = 1.0


def trainer_arguments(
    given: Mapping[str, object],
    mode: str,
    causal: bool,
    known_elsewhere: list[str],
    evaluated: bool = False,
    objective: str = SFT,
) -> TrlConfig:
    """An SFTConfig (objective dpo: a DPOConfig) from YAML or command-line values, with our defaults; masked models use
    its TrainingArguments part.

    Raises UsageError for an unknown key, with the nearest valid one, for values of the wrong type, and for keys of
    SFTTrainer that a masked model's training would ignore.
    """
    from transformers import HfArgumentParser, TrainingArguments
    from trl import DPOConfig, SFTConfig

    wanted: Any = DPOConfig if objective == DPO else SFTConfig
    names = {f.name for f in dataclasses.fields(wanted) if f.init}
    if "torch_dtype" in given:
        raise UsageError("torch_dtype is the old spelling; write dtype.")
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, *known_elsewhere], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"see the keys of trl's {wanted.__name__}."
            raise UsageError(f"Unknown training key '{key}'; {hint}")
    if not causal:
        shared = {f.name for f in dataclasses.fields(TrainingArguments)} | {"max_length"}
        for key in sorted(set(given) - shared):
            raise UsageError(f"{key} has no effect on a masked language model; remove it.")
    for key in sorted(set(given) & set(_UNUSED.get(objective, ()))):
        raise UsageError(f"{key} has no effect with objective: {objective}; remove it.")
    on_cpu = default_device().type == "cpu" or _as_bool(given.get("use_cpu"))
    _check_launch(given, on_cpu)
    sharded = _sharded(given)
    defaults: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[mode] / (10 if objective == DPO else 1),
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "report_to": [name for name in _TRACKERS if importlib.util.find_spec(name)],
        "disable_tqdm": True,  # a line per logging step says more
        "logging_nan_inf_filter": False,  # else a NaN loss is logged as 0
        "bf16": not on_cpu and not sharded and _bf16_works() and not _as_bool(given.get("fp16")),
        "use_cpu": on_cpu,
        "gradient_checkpointing": not on_cpu,
        "eval_strategy": "epoch" if evaluated else "no",
    }
    parser = HfArgumentParser(wanted)

    def fail(message: str) -> None:
        raise UsageError(f"Training configuration: {message}.")

    parser.error = fail  # type: ignore[method-assign,assignment]
    words: list[str] = []
    values = defaults | {k: v for k, v in given.items() if v is not None}
    trackers = values.pop("report_to")  # may be a list, which the parser below takes one word of
    values["report_to"] = trackers if isinstance(trackers, str) else "none"
    switches = {f.name for f in dataclasses.fields(wanted) if re.search(r"\bbool\b", str(f.type))}
    for key, value in values.items():
        if key in switches and str(value).lower() in _SWITCHED:
            value = _SWITCHED[str(value).lower()]
        words.append(f"--{key}")
        words.extend(_words(value))
    try:
        result = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)[0]
    except (ValueError, TypeError) as error:
        raise UsageError(f"Training configuration: {error}") from error
    if not isinstance(trackers, str):
        result.report_to = [str(name) for name in trackers if name != "none"]
    if result.n_gpu > 1:  # else one process becomes nn.DataParallel, which splits batches behind our back
        result._n_gpu = 1
    return result


def _check_launch(given: Mapping[str, object], on_cpu: bool) -> None:
    """Refuse ways of sharing out the model that cannot work; DDP and FSDP2 do."""
    if given.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError(
            "DeepSpeed's ZeRO keeps a flat copy of the parameters in one dtype, but packed codes and float32 factors "
            "have different ones; use several processes without it, or FSDP2."
        )
    if not _sharded(given):
        return
    config = _mapping(given.get("fsdp_config"))
    version = config.get("version") or config.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
    if str(version) != "2":
        raise UsageError(
            "FSDP1 flattens the parameters of a block into one tensor of one dtype, but packed codes and float32 "
            "factors have different ones; set version 2 (fsdp_config: {version: 2}; in accelerate's own file "
            "fsdp_version: 2)."
        )
    mixed = [key for key in ("bf16", "fp16") if _as_bool(given.get(key))]
    if not mixed and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        mixed = [f"accelerate's mixed_precision: {os.environ['ACCELERATE_MIXED_PRECISION']}"]
    if mixed:
        raise UsageError(
            f"Got {mixed[0]} with FSDP2, which would cast all floating-point parameters to it, the scales of packed "
            "codes too; leave it out and set dtype: bfloat16, in which frozen weights are then loaded."
        )
    if on_cpu:
        raise UsageError("FSDP on a CPU silently becomes plain data parallelism (accelerate); leave it out there.")


def _sharded(given: Mapping[str, object]) -> bool:
    """Whether the run is launched with FSDP."""
    return bool(given.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _mapping(value: object) -> dict[str, Any]:
    """fsdp_config as transformers takes it: a mapping, its JSON, or a file of that."""
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text() if Path(value).is_file() else value)
        except (OSError, ValueError) as error:
            raise UsageError(f"fsdp_config {value} is neither JSON nor a JSON file ({error}).") from error
    return value if isinstance(value, dict) else {}


def _words(value: object) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value)]


def _as_bool(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes", "on", "y", "t")


def _bf16_works() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()
