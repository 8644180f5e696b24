"""The verbs: each a function that tells its whole story in order, called by the command line and by Python users alike.

Keyword arguments are the fields of the verb's record in config.py.
"""

from __future__ import annotations

import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from .adapters.loading import load
from .cards import export_card, training_card
from .chatting import Talk, converse, prompts_of
from .config import (
    ChatConfig,
    CorrectConfig,
    DecomposeConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    TrainConfig,
)
from .console import LiveTable, human_bytes, is_main_process, note, say, show_next
from .correction.adapter import SERVED, adapter_in, open_quantized, show_gain
from .correction.gguf_file import GGUFFile
from .data.texts import documents
from .data.weighted import names_of
from .declared import PLAIN
from .decomposing import run_decomposition
from .decomposition import Compared, Rates
from .decomposition.decide import decide
from .decomposition.survey import survey
from .dry_run import show_dry_run, show_steps
from .errors import LordWarning, UsageError
from .evaluating import measured, prepared
from .exports.alone import check_base
from .exports.run import export_model, own_dtype
from .exports.source import Source, open_source
from .inspecting import report_of
from .integrations.checkpoint import skeleton
from .integrations.companions import companions_of
from .integrations.destination import protect, protect_file
from .integrations.files import ADAPTER_FILE, relative_folder
from .integrations.hub import CHECKPOINTS, check_push, push
from .integrations.models import default_device, quiet
from .integrations.running import kind_of, run_model, window_length
from .integrations.sources import gguf_file, resolve_model, weights_identity
from .journey import described, journey, show_journey
from .keywords import documented
from .layers import dequantize_once, plain_model
from .merges import ORIGINAL, UNMERGED, Merges, weigh
from .options import Export
from .parallel import Workers
from .plan_tables import backbones_of, show_compared, with_budget, write_sweep
from .planning import plan_on_text
from .plans import FORMAT_VERSION
from .protocols import CausalModel, TrlConfig
from .provenance import command_line, identity_of, made_from, versions
from .resolve import (
    asked_text,
    check_formats,
    estimate_of,
    foresee,
    outside_of,
    request_of,
    training_dtype,
)
from .signatures import (
    ChatOptions,
    CorrectOptions,
    DecomposeOptions,
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    PlanOptions,
)
from .size_tables import show_bytes
from .storage import (
    atomic_directory,
    check_destination,
    check_json_file,
    sole_writer,
    write_json,
    write_text,
)
from .tables import (
    LAYER_COLUMNS,
    LAYER_WIDTHS,
    layer_rows,
    notify_training,
    show_estimate,
    show_layers,
    show_memory,
    show_totals,
)
from .training import TrainOptions, begun, train_model, trainer_arguments


@documented(DecomposeConfig)
def decompose(model: str, out: str, **options: Unpack[DecomposeOptions]) -> dict[str, Any]:
    """Decompose a model into a factored checkpoint at `out`; returns the content of decomposition.json.

    Under `accelerate launch --num_processes N -m lord_tune decompose ...` the processes share the work.
    """
    config = DecomposeConfig.build({"model": model, "out": out, **options})
    if config.dry_run:
        check_formats(config)
        return show_dry_run(config, [config.model], config.sources(), [config.plan_file])
    quiet()
    check_formats(config)
    check_push(config.push_to_hub)
    protect(Path(config.out), [config.model], [*config.sources(), config.plan_file], config.overwrite)
    report = run_decomposition(config, command_line("decompose", config))
    push(Path(config.out), *config.upload())
    return report


@documented(CorrectConfig)
def correct(quantized: str, original: str, out: str, **options: Unpack[CorrectOptions]) -> dict[str, Any]:
    """Fit L R to what a quantized checkpoint left out of its original: a factored checkpoint with the checkpoint's own
    codes at `out`, and the adapter for that very file in it; returns the content of decomposition.json."""
    config = CorrectConfig.build({"quantized": quantized, "original": original, "out": out, **options})
    if config.dry_run:
        return show_dry_run(config, [config.original], names_of(config.calibration), [config.quantized])
    quiet()
    check_push(config.push_to_hub)
    protect(Path(config.out), [config.quantized, config.original], names_of(config.calibration), config.overwrite)
    check_destination(Path(config.out), config.overwrite)
    source = open_quantized(config.quantized)
    fit = {name: getattr(config, name) for name in config.model_fields_set & set(DecomposeConfig.model_fields)}
    fit |= {"model": config.original, "rank": config.rank, "method": "whitened", "form": PLAIN, "out": config.out}
    own = DecomposeConfig.build(fit)
    served = SERVED[config.adapter_type] if isinstance(source, GGUFFile) else None
    command = command_line("correct", config)
    report = run_decomposition(own, command, source, served, lambda folder: adapter_in(folder, config))
    show_gain(report)
    push(Path(config.out), *config.upload())
    return report


@documented(PlanConfig)
def plan(model: str, **options: Unpack[PlanOptions]) -> dict[str, Any]:
    """What `decompose` with these options would need and produce, from shapes alone; returns the keys of `--json`."""
    config = PlanConfig.build(with_budget({"model": model, **options}))
    quiet()
    sweep = [] if config.sweep is None else [f"{config.sweep}.{kind}" for kind in ("json", "png", "svg")]
    for file in (config.json_file, config.save, *sweep):
        protect_file(file, [config.model], [*config.sources(), config.plan_file])
    check_json_file(config.json_file)
    source_name = resolve_model(config.model)
    shape = skeleton(source_name, config.dtype)
    size = None
    if config.needs_text or config.calibration or config.given("calibration_tokens"):
        size = asked_text(config, window_length(config.context_length, shape))
    device = default_device()
    request = request_of(config)
    found = survey(shape, request.targets, request.exclude, run_model)
    for text in found.notes():
        warnings.warn(text, LordWarning, stacklevel=2)
    if config.sweep is not None:
        return write_sweep(config, source_name, request)
    outside = outside_of(shape, found, request)
    chosen = decide(found.layers, request, outside.rest, outside.embeddings)
    rates = Rates.measure(next(shape.parameters()).dtype, device)
    foreseen = estimate_of(shape, found, request, chosen, size, rates, config.processes, device)
    compared = Compared()
    if config.save is not None:
        if chosen is None:
            with LiveTable(LAYER_COLUMNS, LAYER_WIDTHS) as table:
                chosen, compared = plan_on_text(config, source_name, request, Path(config.save), layer_rows(table))
            foreseen = estimate_of(shape, found, request, chosen, size, rates, config.processes, device)
        made = chosen.made or made_from(config, identity_of(config.model, source_name), None)
        replace(chosen, made=made, embeddings=outside.tables).save(Path(config.save))
        say(f"wrote {config.save}: a choice for each of {len(chosen.layers)} layers; decompose MODEL OUT --plan FILE")
    result: dict[str, Any] = {"model": config.model, **foreseen.to_dict()}
    legs = []
    if config.gpu_memory is not None:
        legs = journey(config, shape, found, request, chosen, size, foreseen, outside.rest)
        result["journey"] = described(legs, config)
    if config.json_file:
        write_json(Path(config.json_file), result)
        return result
    show_estimate(foreseen, found, config, config.backbone if chosen is None else backbones_of(chosen))
    show_compared(chosen, compared)
    if legs:
        show_journey(legs, config, decided=chosen is not None)
    return result


@documented(TrainConfig)
def train(**options: object) -> dict[str, Any]:
    """Train the factors of a factored checkpoint, or adapters on them; returns the content of train_results.json.

    Besides the options below, every argument of trl's SFTConfig is a keyword (with objective="dpo": of DPOConfig).
    """
    config = TrainConfig.build(options)
    quiet()
    own = [name for name in TrainConfig.model_fields if name != "dry_run"]
    held = bool(config.eval_dataset_name or config.dataset_test_split)
    if config.dry_run:
        arguments = trainer_arguments(config.trainer_values(), config.mode, True, own, held, config.objective)
        teacher = config.teacher_model_name_or_path
        shown = show_dry_run(
            config, [config.model_name_or_path, teacher], [config.dataset_name, config.eval_dataset_name]
        )
        shown |= {"effective": show_steps(arguments)}
        foreseen = None
        if Path(config.model_name_or_path).is_dir():
            foreseen = foresee(config, resolve_model(config.model_name_or_path), arguments)
        else:
            note(f"{config.model_name_or_path} is not on this machine, so its memory is not foreseen")
        if foreseen is not None:
            show_memory(foreseen)
        return shown | {"memory": None if foreseen is None else foreseen.to_dict()}
    check_push(config.upload()[0])
    source = resolve_model(config.model_name_or_path)
    if (Path(source) / ADAPTER_FILE).is_file():
        raise UsageError(
            f"{source} is the output of a training run. To continue that run, start it again with the same options; to "
            "train on from its result, export it with `format` factored and train that."
        )
    protect(Path(config.output_dir), [source, config.teacher_model_name_or_path])
    if config.teacher_logits is not None:
        protect(Path(config.teacher_logits), [source, config.teacher_model_name_or_path])
    # before any loading
    arguments = trainer_arguments(config.trainer_values(), config.mode, True, own, held, config.objective)
    with sole_writer(Path(config.output_dir), Workers.launched()):
        metrics = _train(config, source, arguments, own, held)
    push(Path(config.output_dir), *config.upload(), leave_out=[CHECKPOINTS])
    return metrics


def _train(config: TrainConfig, source: str, arguments: TrlConfig, own: list[str], held: bool) -> dict[str, Any]:
    """The run itself, whose output is written by nobody else. own: names of options that are not trl's."""
    resolved = config.model_dump()
    if (earlier := begun(Path(config.output_dir), arguments)) is not None:
        say(f"continuing the run in {config.output_dir} from {earlier.name}")
    foreseen = foresee(config, source, arguments)
    model, tokenizer = load(source, training_dtype(config))
    if config.dequantize_once:
        _keep_dense(model)
    causal = kind_of(model) == "causal"
    arguments = trainer_arguments(config.trainer_values(), config.mode, causal, own, held, config.objective)
    resolved |= {"base": weights_identity(source), "base_folder": relative_folder(source, Path(config.output_dir))}
    names = TrainOptions.__dataclass_fields__
    chosen = TrainOptions(**{key: value for key, value in resolved.items() if key in names})
    command = command_line("train", config)
    metrics = train_model(model, tokenizer, chosen, arguments, resolved, notify_training, foreseen)
    if is_main_process():
        write_text(Path(config.output_dir) / "README.md", training_card(resolved, metrics, command, source))
        say(f"trained {metrics['steps']} steps, mean loss {metrics['train_loss']:.4f}; adapter in {config.output_dir}")
        if foreseen is not None:
            show_memory(foreseen, metrics["memory"]["measured"])
        form = "factored" if config.mode == "basis" else "dense"
        then = "then train that" if config.mode == "basis" else "or evaluate it, or another form of export"
        show_next("export", config.output_dir, f"{config.output_dir.rstrip('/')}_{form}", "--format", form, then=then)
    return metrics


@documented(EvaluateConfig)
def evaluate(model: str, text: str | list[str] | None = None, **options: Unpack[EvaluateOptions]) -> dict[str, Any]:
    """Perplexity on texts, tasks, comparison with the original, sizes and speed; returns the keys of `--json`."""
    config = EvaluateConfig.build({"model": model, "text": text, **options})
    if config.dry_run:
        return show_dry_run(config, [config.model, config.original], config.text or [], [config.tasks_dir])
    quiet()
    asked = prepared(config)
    loaded, tokenizer = load(config.model, config.dtype)
    if config.dequantize_once:
        _keep_dense(loaded)
    return measured(config, asked, loaded, tokenizer)


@documented(ExportConfig)
def export(model: str, out: str, format: Export, **options: Unpack[ExportOptions]) -> dict[str, Any]:
    """Write a factored checkpoint or training output in another form; returns export.json's content."""
    config = ExportConfig.build({"model": model, "out": out, "format": format, **options})
    models, data = [config.model, config.base, config.like], [config.text, *names_of(config.calibration)]
    if config.dry_run:
        gguf_file(config.like)
        return show_dry_run(config, [config.model], data, [config.base])
    quiet()
    check_push(config.push_to_hub)
    protect(Path(config.out), models, data, config.overwrite)
    check_destination(Path(config.out), config.overwrite)
    with sole_writer(Path(config.out)):
        result = _export(config)
    push(Path(config.out), *config.upload())
    return result


def _export(config: ExportConfig) -> dict[str, Any]:
    """The export itself, whose output is written by nobody else."""
    like, weighed = gguf_file(config.like), {}
    base = None if config.base is None else Path(config.base)
    if base is not None:
        check_base(base, config.format)
    beside = companions_of(resolve_model(config.model))
    command = command_line("export", config)
    notes: list[str] = []
    with ExitStack() as stack, atomic_directory(Path(config.out), config.overwrite) as folder:
        if config.advise or config.merge is not None:
            work = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lord_tune_merge_"))
            merges = Merges(config, Path(work), decompose)
            weighed = weigh(merges, config)
            loaded, tokenizer = merges.model(config.merge or UNMERGED), merges.tokenizer
            source = Source(loaded)
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lord_tune_read_"))
            source, tokenizer = open_source(config.model, Path(scratch))
        text = (
            None
            if config.text is None
            else "\n\n".join(documents([config.text], tokenizer, config.plain_prompts, note))
        )
        own = own_dtype(plain_model(source.model).dtype)
        comparison = export_model(
            *(source, tokenizer, folder, config.format, config.dtype, config.threshold, text, Path(config.out), beside),
            **config.model_dump(include={"pad_ranks", "dense_type", "adapter_type"}),
            like=like,
            notes=notes,
            merged=config.merge == ORIGINAL,
            base=base,
        )
        result: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "source": config.model,
            "format": config.format,
            "dtype": config.dtype or (own if config.format == "dense" else None),
            "command": command,
            "comparison": asdict(comparison),
            **({"notes": notes} if notes else {}),
            **weighed,
            "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".gguf")),
            "versions": versions(),
        }
        write_json(folder / "export.json", result)
        write_text(folder / "README.md", export_card(result, config.model, folder, config.base))
    size = human_bytes(result["bytes"])
    for words in notes:
        say(words)
    say(f"wrote {config.out} ({config.format}, {size}); reloaded and compared on {comparison}")
    return result


def _keep_dense(model: CausalModel) -> None:
    held = dequantize_once(model, model.dtype)
    if not held:
        raise UsageError("The model has no quantized layers, so `dequantize_once` has no effect; remove it.")
    say(f"quantized weights are decoded once: {human_bytes(held)} more memory")


@documented(ChatConfig)
def chat(model: str, **options: Unpack[ChatOptions]) -> list[dict[str, str]]:
    """Talk to a model by its chat template, or continue text where it has none; returns prompts and answers."""
    config = ChatConfig.build({"model": model, **options})
    quiet()
    protect_file(config.json_file, [config.model], [config.file])
    check_json_file(config.json_file)
    loaded, tokenizer = load(config.model, config.dtype)
    if config.dequantize_once:
        _keep_dense(loaded)
    torch.manual_seed(config.seed)
    talk = Talk(loaded, tokenizer, config)
    if not talk.templated:
        note("the tokenizer has no chat template: each prompt is continued as it is")
    found: list[dict[str, str]] = []
    try:
        for answer in converse(talk, *prompts_of(config)):
            found.append(answer)
    finally:
        if config.json_file:
            write_json(Path(config.json_file), found)
    return found


@documented(InspectConfig)
def inspect(model: str, **options: Unpack[InspectOptions]) -> dict[str, Any]:
    """The per-layer record of a factored checkpoint, from its decomposition.json (or its manifest alone)."""
    config = InspectConfig.build({"model": model, **options})
    protect_file(config.json_file, [config.model])
    check_json_file(config.json_file)
    folder, report = report_of(Path(config.model))
    if config.json_file:
        write_json(Path(config.json_file), report)
        return report
    show_layers(str(folder), report["layers"])
    if "model_bytes" in report["totals"]:
        show_totals(report["totals"])
    show_bytes(report["totals"]["bytes_by_part"])
    return report
