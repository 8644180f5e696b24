"""The names of methods, formats and allocators, and the options they declare.

Written by scripts/make_options.py: do not edit.

A method, a format or an allocator declares its options in its own file, with `option(...)`; see declared.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Method = Literal["whitened", "svd", "two_sided", "afm", "loftq", "caldera", "tucker"]
Quantized = Literal[
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
Allocation = Literal["uniform", "loss_weighted", "mixed", "energy", "typed", "bolaco", "spread"]
Export = Literal["dense", "factored", "peft", "compressed-tensors", "gguf", "vllm"]


class MethodOptions(BaseModel):
    """What methods, formats and allocators declare."""

    sink_weight: float = Field(
        0.05,
        ge=0,
        description=("whitened, two_sided: extra weight of position-0 inputs (attention sinks) in the Gram matrix"),
    )
    shrinkage: float | Literal["auto"] = Field(
        0.0, description=("whitened: share of the Gram matrix's diagonal; auto: per layer, by held-out error")
    )
    rounding: Literal["feedback", "nearest"] = Field(
        "feedback",
        description=(
            "whitened, two_sided, afm: how Q is rounded: with error feedback on the calibration text (LDLQ), "
            "or to the nearest, as a baseline"
        ),
    )
    damping: float = Field(
        0.1,
        ge=1e-06,
        le=1,
        description=(
            "two_sided: share of the identity in the gradients' second moment; 1 weighs all outputs alike, as"
            " whitened does"
        ),
    )
    centred: bool = Field(True, description=("afm: centre the outputs and correct the bias, as LoRD is published"))
    covariance_groups: int = Field(
        1,
        ge=1,
        description=(
            "afm: average the covariances of this many groups of calibration windows, in place of that of all tokens"
        ),
    )
    iterations: int | None = Field(
        None, gt=0, description=("loftq, caldera: alternations of Q and L R; default: loftq 5, caldera 6")
    )
    downdate: Literal["auto", "on", "off"] = Field(
        "auto", description=("caldera: spend no feedback on directions that L R carries; auto keeps the better")
    )
    order: Literal["auto", "q", "lr", "outliers"] = Field(
        "auto",
        description=(
            "caldera: what is fitted to W first, Q or L R, or L R to the channels of the largest inputs "
            "(ODLRI); auto keeps the better of q and lr"
        ),
    )
    weighting: Literal["activations", "fisher"] = Field(
        "activations",
        description=(
            "caldera: what an error costs: by the inputs' second moment, or by row and column means of "
            "squared gradients (LQ-LoRA)"
        ),
    )
    block_size: int = Field(64, description=("nf4: weights per scale"))
    double_quant: bool = Field(False, description=("nf4: store the scales in 8 bits"))
    group_size: int | None = Field(
        None,
        gt=0,
        description=(
            "int, lloyd, spqr, w2a, w4a, w8a: weights per scale; default: int 64, lloyd 64, spqr 16, w2a 128,"
            " w4a 128, w8a 128"
        ),
    )
    symmetric: bool | None = Field(
        None, description=("int, w2a, w4a, w8a: no zero point; default: int False, w2a True, w4a True, w8a True")
    )
    spqr_bits: int = Field(3, ge=2, le=4, description=("spqr: bits of a weight that is no outlier"))
    outliers: float = Field(0.01, ge=0, lt=0.5, description=("spqr: fraction of weights kept in 16 bits"))
    trials: int = Field(50, ge=1, description=("bolaco: whole models that the search runs"))
    probes: int = Field(
        20, ge=2, description=("bolaco: random ones that are run before, to choose the windows it runs on")
    )
    validation_tokens: int = Field(
        4096,
        gt=0,
        description=(
            "bolaco: tokens of held-out text that a model is run on, of twice as many that are held out for it"
        ),
    )
    kl_weight: float = Field(
        4.0, ge=0, description=("bolaco: w in perplexity + w KL(compressed || original), the mean over tokens")
    )
    searched: str | None = Field(
        None,
        description=(
            "bolaco: roles of the layers that are compressed, of qk v qkv o gate up down other: a comma "
            "between those with a fraction each, a plus between those that share one; all others stay dense; "
            "default: all but v, a fraction each"
        ),
    )


METHOD_KEYS = (
    "sink_weight",
    "shrinkage",
    "rounding",
    "damping",
    "centred",
    "covariance_groups",
    "iterations",
    "downdate",
    "order",
    "weighting",
)

FORMAT_KEYS = ("block_size", "double_quant", "group_size", "symmetric", "spqr_bits", "outliers")

ALLOCATION_KEYS = ("trials", "probes", "validation_tokens", "kl_weight", "searched")
