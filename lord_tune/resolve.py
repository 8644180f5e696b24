"""From a verb's record to what the run works with: settings, formats, windows of text, the estimate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import psutil
import torch

from .allocation import ALLOCATORS
from .calibration.corpus import token_windows
from .config import DecomposeConfig, MethodConfig
from .data.rows import documents, text_sha256
from .decomposition import (
    BlockRecovery,
    Estimate,
    Rates,
    Settings,
    TextSize,
    Windows,
    check_budget,
    estimate_run,
    fit_format,
    known_ranks,
    survey,
    trace,
)
from .errors import LordWarning
from .factorizations import METHODS
from .integrations.running import max_length, run_on_meta, window_length
from .quantizers import DTYPES, make_quantizer

SHRINKAGES = (0.0, 0.05, 0.15, 0.4)  # candidates of --shrinkage auto
SENSITIVITY_LENGTH = 256  # tokens per window of the backward pass: its activations are what peaks


def text_size_of(windows: Windows | None) -> TextSize | None:
    if windows is None:
        return None
    sensitivity = windows.sensitivity
    return TextSize(
        windows.calibration.numel(),
        windows.heldout.numel(),
        windows.calibration.shape[1],
        sensitivity.numel(),
        sensitivity.shape[1],
    )


def estimate_of(shape: Any, settings: Settings, text: TextSize | None, rates: Rates | None, processes: int) -> Estimate:
    """For a skeleton on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # the run itself says them
        found = survey(shape, settings)
    check_budget(found.layers, settings)
    length = text.length if text is not None else min(64, max_length(shape))
    groups, flops = trace(shape, found, run_on_meta, length)
    held = psutil.Process().memory_info().rss
    ranks = known_ranks(found.layers, settings)
    return estimate_run(shape, found, settings, text, ranks, groups, flops, held, rates, processes)


def _format_options(config: MethodConfig, form: str) -> dict[str, Any]:
    """The hyperparameters of a storage format."""
    if form == "nf4":
        options: dict[str, Any] = {"block_size": config.block_size, "double_quant": config.double_quant}
    elif form == "spqr":
        options = {"bits": config.spqr_bits, "outlier_fraction": config.outliers}
        options["group_size"] = config.group_size or 16
    elif form.startswith(("int", "lloyd")):
        options = {"group_size": config.group_size or 64}
        options |= {"symmetric": config.symmetric} if form.startswith("int") else {}
    else:
        options = {}
    by_default = form.startswith(("lloyd", "e8"))
    if by_default if config.incoherence is None else config.incoherence:
        options |= {"incoherence": True, "seed": config.seed}
    return options


def check_formats(config: MethodConfig) -> None:
    """Refuse bad hyperparameters of the formats before any work."""
    for form in (config.backbone, config.factor_format):
        if form is not None and form != "none" and form not in DTYPES:
            make_quantizer(form, _format_options(config, form))


def settings_of(config: MethodConfig, shape: Any) -> Settings:
    """What to do with every layer; `shape` is the skeleton, on which widths in bits are tried."""
    form, top = config.factor_format, config.top_format
    iterations = {} if config.iterations is None else {"iterations": config.iterations}
    by_method: dict[str, dict[str, Any]] = {
        "whitened": {
            "sink_weight": config.sink_weight,
            "shrinkage": 0.0 if config.shrinkage == "auto" else config.shrinkage,
        },
        "afm": {"centred": config.centred},
        "loftq": iterations,
        "caldera": iterations | {"downdate": config.downdate, "order": config.order, "weighting": config.weighting},
    }
    choose_format = config.bits_per_weight is not None and config.backbone == "none"
    formats = config.families() if choose_format else [] if config.backbone == "none" else [config.backbone]
    quantizers = [make_quantizer(name, _format_options(config, name)) for name in formats]
    settings = Settings(
        method=METHODS[config.method](**by_method.get(config.method, {})),
        quantizer=quantizers[0] if quantizers else None,
        rank=config.rank,
        kept_fraction=config.kept_fraction,
        allocator=ALLOCATORS[config.allocation](),
        factor_format=form,
        factor_options={} if form is None or form in DTYPES else _format_options(config, form),
        top_rank=config.top_rank,
        top_format=top,
        top_options={} if top in DTYPES else {"group_size": 64},
        bits_per_weight=None if config.rank is not None else config.bits_per_weight,
        targets=config.targets,
        exclude=config.exclude,
        recovery=BlockRecovery(config.recover_epochs, config.recover_learning_rate) if config.recover_epochs else None,
        propagate=config.propagate,
        shrinkages=SHRINKAGES if config.shrinkage == "auto" else (),
    )
    if not choose_format:
        return settings
    assert config.bits_per_weight is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # the run itself says them
        layers = survey(shape, replace(settings, rank=0, bits_per_weight=None)).layers  # no budget to refuse yet
    smallest = {} if config.rank is None else {"smallest_rank": config.rank}
    return fit_format(layers, settings, quantizers, config.bits_per_weight, **smallest)


def asked_text(config: MethodConfig, length: int) -> TextSize:
    """How much text a run reads in windows of `length` tokens, where there is enough of it."""
    windows = -(-config.calibration_tokens // length)
    heldout = max(1, -(-(config.calibration_tokens // 16) // length))
    short = min(SENSITIVITY_LENGTH, length)
    weighted = min(max(1, config.sensitivity_tokens // short), windows * (length // short))
    return TextSize(windows * length, heldout * length, length, weighted * short, short)


def windows_of(config: DecomposeConfig, model: Any, tokenizer: Any) -> tuple[Windows | None, dict[str, Any]]:
    if not config.calibration:
        return None, {"tokens": 0, "source": [], "sha256": None}
    texts = documents(list(config.calibration), tokenizer)
    asked = asked_text(config, window_length(config.context_length, model))
    length, short = asked.length, asked.sensitivity_length
    calibration, heldout = token_windows(texts, tokenizer, asked.tokens, asked.heldout, length, config.seed)
    pieces = calibration[:, : length // short * short].reshape(-1, short)
    # an even sample over all windows, not the first ones only
    count = min(asked.sensitivity // short, len(pieces))
    sensitivity = pieces[torch.linspace(0, len(pieces) - 1, count).long()]
    described = {
        "tokens": calibration.numel(),
        "heldout_tokens": heldout.numel(),
        "context_length": length,
        "source": list(config.calibration),
        "sha256": text_sha256(texts),
    }
    return Windows(calibration, heldout, sensitivity), described
