"""The keyword arguments of the verbs, for type checkers and editors.

Written by scripts/make_options.py: do not edit.

What a verb takes by position is in its own signature, so it is missing here. `train` has no entry, because every
argument of trl's trainers is one of its keywords as well.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class QuickstartOptions(TypedDict, total=False):
    """Keywords of `quickstart`."""

    out: str
    model: str
    calibration_tokens: int
    eval_tokens: int
    context_length: int
    steps: int
    rank: int
    kept_fraction: float
    dry_run: bool
    overwrite: bool


class PlanOptions(TypedDict, total=False):
    """Keywords of `plan`."""

    sink_weight: float
    shrinkage: float | Literal["auto"]
    rounding: Literal["feedback", "nearest"]
    damping: float
    centred: bool
    covariance_groups: int
    iterations: int | None
    downdate: Literal["auto", "on", "off"]
    order: Literal["auto", "q", "lr", "outliers"]
    weighting: Literal["activations", "fisher"]
    block_size: int
    double_quant: bool
    group_size: int | None
    symmetric: bool | None
    spqr_bits: int
    outliers: float
    trials: int
    probes: int
    validation_tokens: int
    kl_weight: float
    searched: str | None
    method: Literal["whitened", "svd", "two_sided", "afm", "loftq", "caldera", "tucker"] | None
    backbone: Literal[
        "none",
        "nf4",
        "int2",
        "int3",
        "int4",
        "int8",
        "lloyd2",
        "lloyd3",
        "lloyd4",
        "e8-2",
        "e8-3",
        "e8-4",
        "spqr",
        "q2_0",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "w2a16",
        "w4a16",
        "w8a16",
    ]
    embeddings: Literal["dense", "int8", "int4", "int3", "int2", "nf4", "e8-4", "e8-3", "e8-2"]
    factor_format: (
        Literal[
            "fp32",
            "fp16",
            "bf16",
            "nf4",
            "int2",
            "int3",
            "int4",
            "int8",
            "lloyd2",
            "lloyd3",
            "lloyd4",
            "e8-2",
            "e8-3",
            "e8-4",
            "spqr",
            "q2_0",
            "q4_0",
            "q4_1",
            "q5_0",
            "q5_1",
            "q8_0",
            "w2a16",
            "w4a16",
            "w8a16",
        ]
        | None
    )
    form: Literal["plain", "pivoted"] | None
    top_rank: int
    top_format: Literal["fp32", "fp16", "bf16", "int8"]
    rank: int | None
    full_rank: bool
    average_rank: int | None
    kept_fraction: float | None
    bits_per_weight: float | None
    max_bytes: str | None
    plan: str | None
    allocation: Literal["uniform", "loss_weighted", "mixed", "energy", "typed", "bolaco", "spread"]
    mix: str | list[str] | None
    refine: int
    measure_control: bool
    calibration: str | list[str]
    plain_prompts: bool
    calibration_tokens: int
    context_length: int
    sensitivity_tokens: int
    propagate: Literal["dense", "sequential"]
    recover_epochs: int
    recover_learning_rate: float
    incoherence: bool | None
    targets: str | None
    exclude: str | None
    seed: int
    dtype: Literal["float32", "float16", "bfloat16"] | None
    save: str | None
    sweep: str | None
    measure: bool
    processes: int
    gpu_memory: str | None
    json: str | None


class DecomposeOptions(TypedDict, total=False):
    """Keywords of `decompose`."""

    sink_weight: float
    shrinkage: float | Literal["auto"]
    rounding: Literal["feedback", "nearest"]
    damping: float
    centred: bool
    covariance_groups: int
    iterations: int | None
    downdate: Literal["auto", "on", "off"]
    order: Literal["auto", "q", "lr", "outliers"]
    weighting: Literal["activations", "fisher"]
    block_size: int
    double_quant: bool
    group_size: int | None
    symmetric: bool | None
    spqr_bits: int
    outliers: float
    trials: int
    probes: int
    validation_tokens: int
    kl_weight: float
    searched: str | None
    method: Literal["whitened", "svd", "two_sided", "afm", "loftq", "caldera", "tucker"] | None
    backbone: Literal[
        "none",
        "nf4",
        "int2",
        "int3",
        "int4",
        "int8",
        "lloyd2",
        "lloyd3",
        "lloyd4",
        "e8-2",
        "e8-3",
        "e8-4",
        "spqr",
        "q2_0",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "w2a16",
        "w4a16",
        "w8a16",
    ]
    embeddings: Literal["dense", "int8", "int4", "int3", "int2", "nf4", "e8-4", "e8-3", "e8-2"]
    factor_format: (
        Literal[
            "fp32",
            "fp16",
            "bf16",
            "nf4",
            "int2",
            "int3",
            "int4",
            "int8",
            "lloyd2",
            "lloyd3",
            "lloyd4",
            "e8-2",
            "e8-3",
            "e8-4",
            "spqr",
            "q2_0",
            "q4_0",
            "q4_1",
            "q5_0",
            "q5_1",
            "q8_0",
            "w2a16",
            "w4a16",
            "w8a16",
        ]
        | None
    )
    form: Literal["plain", "pivoted"] | None
    top_rank: int
    top_format: Literal["fp32", "fp16", "bf16", "int8"]
    rank: int | None
    full_rank: bool
    average_rank: int | None
    kept_fraction: float | None
    bits_per_weight: float | None
    max_bytes: str | None
    plan: str | None
    allocation: Literal["uniform", "loss_weighted", "mixed", "energy", "typed", "bolaco", "spread"]
    mix: str | list[str] | None
    refine: int
    measure_control: bool
    calibration: str | list[str]
    plain_prompts: bool
    calibration_tokens: int
    context_length: int
    sensitivity_tokens: int
    propagate: Literal["dense", "sequential"]
    recover_epochs: int
    recover_learning_rate: float
    incoherence: bool | None
    targets: str | None
    exclude: str | None
    seed: int
    dtype: Literal["float32", "float16", "bfloat16"] | None
    push_to_hub: str | None
    private: bool
    resume: bool
    overwrite: bool
    dry_run: bool


class EvaluateOptions(TypedDict, total=False):
    """Keywords of `evaluate`."""

    original: str | None
    samples: int
    plain_prompts: bool
    context_length: int
    max_tokens: int | None
    tasks: str | list[str]
    tasks_dir: str | None
    limit: int | None
    apply_chat_template: bool
    confirm_run_unsafe_code: bool
    max_new_tokens: int
    samples_per_problem: int
    temperature: float
    seed: int
    speed: bool
    batch_size: int
    dtype: Literal["float32", "float16", "bfloat16"] | None
    dequantize_once: bool
    json: str | None
    dry_run: bool


class ExportOptions(TypedDict, total=False):
    """Keywords of `export`."""

    push_to_hub: str | None
    private: bool
    dtype: Literal["float32", "float16", "bfloat16"] | None
    pad_ranks: bool
    base: str | None
    like: str | None
    adapter_type: Literal["f16", "q8_0", "f32"]
    dense_type: Literal["f16", "q8_0", "f32"]
    threshold: float | None
    text: str | None
    merge: Literal["original", "nearest", "feedback"] | None
    advise: bool
    merge_limit: float
    calibration: str | list[str]
    calibration_tokens: int
    plain_prompts: bool
    overwrite: bool
    dry_run: bool


class CorrectOptions(TypedDict, total=False):
    """Keywords of `correct`."""

    push_to_hub: str | None
    private: bool
    calibration: str | list[str]
    rank: int
    plain_prompts: bool
    calibration_tokens: int
    context_length: int
    targets: str | None
    exclude: str | None
    factor_format: Literal["fp32", "fp16", "bf16"] | None
    adapter_type: Literal["f16", "q8_0", "f32"]
    dtype: Literal["float32", "float16", "bfloat16"] | None
    seed: int
    overwrite: bool
    dry_run: bool


class ChatOptions(TypedDict, total=False):
    """Keywords of `chat`."""

    prompt: str | None
    file: str | None
    system: str | None
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int
    dtype: Literal["float32", "float16", "bfloat16"] | None
    dequantize_once: bool
    json: str | None


class CompareOptions(TypedDict, total=False):
    """Keywords of `compare`."""

    methods: str | list[str]
    text: str | list[str]
    calibration: str | list[str]
    kept_fraction: float | None
    bits_per_weight: float | None
    max_bytes: str | None
    calibration_tokens: int
    context_length: int
    factor_format: Literal["fp32", "fp16", "bf16"]
    targets: str | None
    exclude: str | None
    dtype: Literal["float32", "float16", "bfloat16"] | None
    max_tokens: int | None
    steps: int
    dataset_name: str | None
    learning_rate: str | list[str]
    max_length: int
    seed: int
    overwrite: bool
    dry_run: bool


class InspectOptions(TypedDict, total=False):
    """Keywords of `inspect`."""

    json: str | None


class ReportOptions(TypedDict, total=False):
    """Keywords of `report`."""

    out: str
    overwrite: bool


class RecipesOptions(TypedDict, total=False):
    """Keywords of `recipes`."""

    overwrite: bool
    json: str | None


class DoctorOptions(TypedDict, total=False):
    """Keywords of `doctor`."""

    json: str | None
