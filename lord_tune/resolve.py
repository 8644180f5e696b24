"""From a verb's record to what the run works with: settings, formats, windows of text, the estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel

from .allocation import ALLOCATORS
from .calibration.corpus import token_windows
from .calibration.mixture import Part, SourceShare, describe, even_sample, in_words, interleaved, mixed_windows
from .config import MIX, MethodConfig, TrainConfig
from .console import note, say
from .data.texts import documents, text_sha256, texts_of
from .declared import PLAIN, Options, chosen, options_of
from .decomposition import (
    Bits,
    BlockRecovery,
    Budget,
    Estimate,
    Given,
    Ranks,
    Rates,
    Request,
    Sized,
    Survey,
    TextSize,
    Unit,
    Untouched,
    Windows,
    estimate_run,
    trace,
)
from .decomposition.embedding import parts_after, planned_tables, saved_bytes
from .errors import LordError, UsageError
from .factorizations import METHODS
from .integrations.files import first_line
from .integrations.models import default_device
from .integrations.running import max_length, run_on_meta, window_length
from .layers.sizes import sizes
from .memory import held_bytes
from .plans import LayerChoice, Plan, TablePlan
from .protocols import Tokenizer, TrlConfig
from .quantizers import DTYPES, QUANTIZERS, make_quantizer
from .training import MemoryEstimate, TrainOptions, predict_memory


class CalibrationText(TypedDict):
    """What a run says of its calibration text."""

    tokens: int
    heldout_tokens: NotRequired[int]
    validation_tokens: NotRequired[int]  # for an allocator that runs whole models
    context_length: NotRequired[int]
    source: list[str]
    sha256: str | None
    mixture: NotRequired[dict[str, SourceShare]]  # of sources with weights


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
        0 if windows.validation is None else windows.validation.numel(),
    )


def estimate_of(
    shape: PreTrainedModel,  # the skeleton, on the meta device
    found: Survey,
    request: Request,
    plan: Plan | None,
    text: TextSize | None,
    rates: Rates | None,
    processes: int,
    device: torch.device,  # that the run works on
) -> Estimate:
    """What the run will need."""
    length = text.length if text is not None else min(64, max_length(shape))
    groups, flops = trace(shape, found, run_on_meta, length)
    held = held_bytes(device)
    return estimate_run(shape, found, request, plan, text, groups, flops, held, rates, processes, device)


def _format_options(config: MethodConfig, form: str) -> Options:
    """The hyperparameters of a storage format."""
    owner = QUANTIZERS[form]
    found: Options = {item.field: item.default for item in options_of(owner)} | chosen(owner, config)
    if owner.rotated_by_default if config.incoherence is None else config.incoherence:
        found |= {"incoherence": True, "seed": config.seed}
    return found


def rest_of(whole: dict[str, float], found: Survey) -> int:
    """Bytes of everything in the checkpoint but the weights to decompose. whole: `sizes` of the model as it is."""
    return int(whole["model_bytes"]) - sum(site.dense_bytes for site in found.layers.values())


@dataclass(frozen=True)
class Outside:
    """Everything in the checkpoint but the weights of the layers to decompose, as it will be stored."""

    tables: dict[str, TablePlan]  # embedding and output head, where these are stored in another format
    rest: int  # bytes of it all
    embeddings: int  # bytes of embedding and output head, of `rest`


def outside_of(model: PreTrainedModel, found: Survey, request: Request) -> Outside:
    """Of a skeleton as it is. UsageError for embeddings that cannot be stored as asked."""
    tables = planned_tables(model, found, request)
    fixed = parts_after(model, found, None, tables)
    rest = rest_of(sizes(model), found) - saved_bytes(model, tables)
    return Outside(tables, rest, fixed["embeddings"] + fixed["head"])


def check_formats(config: MethodConfig) -> None:
    """Refuse bad hyperparameters of the formats before any work."""
    for form in (config.backbone, config.factor_format, *(_mix(config) if config.mixes else ())):
        if form is not None and form != "none" and form not in DTYPES:
            make_quantizer(form, _format_options(config, form))
    if (stored := _embeddings(config)) is not None:
        make_quantizer(*stored)


def request_of(config: MethodConfig) -> Request:
    """What is asked of all layers."""
    recovery = BlockRecovery(config.recover_epochs, config.recover_learning_rate) if config.recover_epochs else None
    template = _template(config)
    budget = _budget(config, template)
    where = config.targets, config.exclude, config.propagate
    rest = config.refine, config.measure_control, config.seed
    return Request(template, budget, *where, recovery, *rest, _embeddings(config))


def _embeddings(config: MethodConfig) -> tuple[str, Options] | None:
    """The format of embedding and output head, never rotated: a rotation mixes the rows."""
    if config.embeddings == "dense":
        return None
    owner = QUANTIZERS[config.embeddings]
    options: Options = {item.field: item.default for item in options_of(owner)} | chosen(owner, config)
    return config.embeddings, options


def _template(config: MethodConfig) -> LayerChoice:
    """Everything of a layer's choice but its rank."""
    form, top = config.factor_format or ("bf16" if config.mixes else None), config.top_format
    template = LayerChoice(
        config.used_method,
        None,
        chosen(METHODS[config.used_method], config),
        factor_format=form,
        factor_options={} if form is None or form in DTYPES else _format_options(config, form),
        top_rank=config.top_rank,
        top_format=top,
        top_options={} if top in DTYPES else {"group_size": 64},
        form=config.stored_form or PLAIN,
    )
    return template if config.backbone == "none" else _with_backbones(config, template, [config.backbone])[0]


def _with_backbones(config: MethodConfig, template: LayerChoice, names: list[str]) -> tuple[LayerChoice, ...]:
    """The template with each of these formats as the backbone, its options completed by their defaults."""
    options = {name: make_quantizer(name, _format_options(config, name)).options() for name in names}
    return tuple(replace(template, backbone=name, backbone_options=options[name]) for name in names)


def _budget(config: MethodConfig, template: LayerChoice) -> Budget:
    if config.plan_file is not None:
        return Given(Plan.read(Path(config.plan_file)))
    if config.embeddings_alone:
        return Untouched()
    if config.sized:
        return _sized(config, template)
    if config.bits_per_weight is not None:
        widths: tuple[LayerChoice, ...] = (template,)
        if config.backbone == "none":
            widths = _with_backbones(config, template, list(METHODS[config.used_method].widths))
        return Bits(config.bits_per_weight, widths, config.rank)
    assert config.rank is not None or config.full_rank, "the record asks for a budget"
    return Ranks(config.rank)


MIXED_RANKS = (0, 8, 16, 32, 64)  # beside the backbones that mixed chooses from


def _sized(config: MethodConfig, template: LayerChoice) -> Sized:
    """The size that is asked for, and what layers may become."""
    unit: Unit = "kept_fraction"
    limit = config.kept_fraction
    if config.max_bytes is not None:
        unit, limit = "max_bytes", config.bytes_asked()
    elif config.bits_per_weight is not None:
        unit, limit = "bits_per_weight", config.bits_per_weight
    elif config.average_rank is not None:
        unit, limit = "average_rank", config.average_rank
    assert limit is not None, "the record asks for a budget"
    backbones: tuple[LayerChoice, ...] = ()
    ranks: tuple[int, ...] | None = None if config.rank is None else (config.rank,)
    beside = template if config.form is not None else replace(template, form=PLAIN)
    if config.mixes:
        backbones, ranks = _with_backbones(config, beside, _mix(config)), ranks or MIXED_RANKS
    elif config.backbone != "none":
        backbones = (template,)
    control: tuple[LayerChoice, ...] = ()
    if backbones and config.by_loss:
        names = list(dict.fromkeys([*(() if config.mixes else (config.backbone,)), *_mix(config)]))
        control = _with_backbones(config, beside, names)
    low_rank = config.backbone == "none" and (config.rank is None or not config.mixes)
    rule = ALLOCATORS[config.allocation]
    return Sized(limit, rule(**chosen(rule, config)), unit, backbones, low_rank, ranks, control)


def _mix(config: MethodConfig) -> list[str]:
    return list(dict.fromkeys(config.mix or MIX))


def asked_text(config: MethodConfig, length: int) -> TextSize:
    """How much text a run reads in windows of `length` tokens, where there is enough of it: of weighted sources at
    least one window of each. UsageError where these are more than the windows."""
    sources = max(1, len(config.weights()))
    windows = -(-config.calibration_tokens // length)
    if windows < sources:
        raise UsageError(
            f"`calibration_tokens` {config.calibration_tokens} fills fewer windows of {length} tokens than the "
            f"{sources} sources of `calibration`; give at least {sources * length}, or a smaller `context_length`."
        )
    if config.covariance_groups > windows:
        raise UsageError(
            f"`covariance_groups` asks for {config.covariance_groups} groups of the {windows} windows that "
            f"`calibration_tokens` fills; give at most {windows}."
        )
    heldout = max(sources, -(-(config.calibration_tokens // 16) // length))
    short = min(SENSITIVITY_LENGTH, length)
    weighted = min(max(sources, config.sensitivity_tokens // short), windows * (length // short))
    searched = -(-2 * config.validation_tokens // length) if config.searches else 0
    validation = max(2 * short, searched * (length // short) * short) if searched else 0
    return TextSize(windows * length, heldout * length, length, weighted * short, short, validation)


def windows_of(config: MethodConfig, model: nn.Module, tokenizer: Tokenizer) -> tuple[Windows | None, CalibrationText]:
    if not config.calibration:
        return None, {"tokens": 0, "source": [], "sha256": None}
    asked = asked_text(config, window_length(config.context_length, model))
    length, short, weights = asked.length, asked.sensitivity_length, config.weights()
    own = asked.heldout // length
    held = own + -(-asked.validation // length)
    if weights:
        found = texts_of(list(weights), tokenizer, config.plain_prompts, note)
        of_source = dict(zip(weights, found, strict=True))
        texts = [text for own_texts in found for text in own_texts]
        mixed = mixed_windows(of_source, weights, tokenizer, asked.tokens // length, held, length, config.seed)
        parts = list(mixed.values())
    else:
        texts = documents(list(config.calibration), tokenizer, config.plain_prompts, note)
        parts = [Part(*token_windows(texts, tokenizer, asked.tokens, held * length, length, config.seed))]
    calibration, heldout = interleaved([p.calibration for p in parts]), interleaved([p.heldout for p in parts])
    if config.covariance_groups > len(calibration):
        raise UsageError(
            f"`covariance_groups` asks for {config.covariance_groups} groups, and the text fills {len(calibration)} "
            "windows; give more text, or fewer groups."
        )
    validation = None
    if asked.validation:
        own = max(1, min(own, len(heldout) - 1))  # of a short text, at least one window of each
        heldout, validation = heldout[:own], _cut(heldout[own:], short)
    # an even sample over all windows, not the first ones only
    pieces = [_cut(part.calibration, short) for part in parts]
    described: CalibrationText = {
        "tokens": calibration.numel(),
        "heldout_tokens": heldout.numel(),
        "context_length": length,
        "source": list(weights or config.calibration),
        "sha256": text_sha256(texts),
    }
    if weights:
        described["mixture"] = describe(mixed, weights)
        say(f"calibrating on {in_words(described['mixture'])}")
    if validation is not None:
        described["validation_tokens"] = validation.numel()
    return Windows(calibration, heldout, even_sample(pieces, asked.sensitivity // short), validation), described


def _cut(windows: torch.Tensor, short: int) -> torch.Tensor:
    """Windows of `short` tokens."""
    return windows[:, : windows.shape[1] // short * short].reshape(-1, short)


def training_dtype(config: TrainConfig) -> str | None:
    """bfloat16 gradients are up to 134 times slower than float32 on CPUs without AVX512; L and R train in float32."""
    return config.dtype or ("float32" if default_device().type == "cpu" else None)


def foresee(config: TrainConfig, source: str, arguments: TrlConfig) -> MemoryEstimate | None:
    """What a run of `config` will hold; None, with a warning, for a model that cannot be run on shapes alone."""
    values = config.model_dump()
    options = TrainOptions(**{key: values[key] for key in TrainOptions.__dataclass_fields__ if key in values})
    try:
        return predict_memory(source, options, arguments, training_dtype(config), config.dequantize_once)
    except LordError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        note(f"the memory of this run cannot be foreseen: {first_line(error)}")
        return None
