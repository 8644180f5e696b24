"""The verbs: each a function that tells its whole story in order, called by the command line and by Python users alike.

Keyword arguments are the fields of the verb's record in config.py.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
import warnings
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from . import __version__
from .allocation import ALLOCATORS
from .calibration.corpus import documents, file_windows, text_sha256, token_windows
from .cards import decomposition_card, export_card, training_card
from .config import (
    DecomposeConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    MethodConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
)
from .console import (
    LiveTable,
    human_bytes,
    is_main_process,
    note,
    progress,
    say,
    show_spans,
    show_table,
)
from .decomposition import (
    BlockRecovery,
    Estimate,
    Journal,
    LayerRecord,
    Rates,
    Settings,
    TextSize,
    Windows,
    decompose_checkpoint,
    estimate,
    fit_format,
    known_ranks,
    survey,
    trace,
)
from .errors import LordError, LordWarning, UsageError
from .evaluation import evaluate_model, sizes
from .exporting import export_model
from .factorizations import METHODS
from .integrations.checkpoint import Checkpoint, skeleton, write_index
from .integrations.models import (
    ADAPTER_FILE,
    base_of_adapter,
    default_device,
    fingerprint,
    first_line,
    kind_of,
    launched_processes,
    load,
    load_tokenizer,
    max_length,
    model_class,
    quiet,
    resolve_model,
    run_on_meta,
    task_of,
    weight_files,
    window_length,
)
from .layer_plan import DTYPES, FORMAT_VERSION, make_quantizer
from .layers import dequantize_once
from .memory import PeakMemory
from .storage import (
    atomic_directory,
    check_destination,
    check_json_file,
    read_json,
    sha256_files,
    write_json,
    write_text,
)
from .tables import (
    LAYER_COLUMNS,
    LAYER_WIDTHS,
    inspect_row,
    layer_rows,
    show_coverage,
    show_decomposition,
    show_estimate,
    show_memory,
    show_totals,
    summary,
)
from .training import MemoryEstimate, TrainOptions, predict_memory, train_model, trainer_arguments

_SHRINKAGES = (0.0, 0.05, 0.15, 0.4)  # candidates of --shrinkage auto
_SENSITIVITY_LENGTH = 256  # tokens per window of the backward pass: its activations are what peaks


def decompose(model: str, out: str, **options: Any) -> dict[str, Any]:
    """Decompose a model into a factored checkpoint at `out`; returns the content of decomposition.json.

    Under `accelerate launch --num_processes N -m lord_tune decompose ...` the processes share the work.
    """
    config = DecomposeConfig.build({"model": model, "out": out, **options})
    if config.dry_run:
        return show_plan(config)
    quiet()
    _check_formats(config)
    workers, device = launched_processes()
    journal = Journal(Path(config.out), workers)
    perhaps_finished = config.resume and not config.overwrite and (journal.out / "decomposition.json").is_file()
    if not perhaps_finished:
        journal.check(config.resume, config.overwrite)
    source_name = resolve_model(config.model)
    _, base_config = model_class(source_name)
    tokenizer = load_tokenizer(source_name)
    windows, calibration = _windows(config, base_config, tokenizer)
    base = workers.send(_identity(config.model, source_name, base_config) if journal.writes else None, 0)
    if perhaps_finished:
        report = read_json(journal.out / "decomposition.json")
        now = json.loads(json.dumps({"config": _lasting(config), "base": base, "calibration": calibration}))
        if now == {key: report[key] for key in now}:
            journal.remove_work()
            say(f"{config.out} is finished already.")
            return report
        journal.check(config.resume, config.overwrite)
    identity = {
        "config": _lasting(config),
        "base": base,
        "calibration": calibration,
        "versions": versions(),
        "processes": workers.size,
    }
    start = time.perf_counter()
    if journal.open(identity, config.resume):
        blocks = sum(1 for step in journal.steps if step.startswith("writing/"))
        note(f"continuing the run in {journal.folder}: {blocks} blocks are written")
    try:
        source = Checkpoint(source_name, config.dtype, journal.work / f"converted-{workers.rank}", device)
        shape = skeleton(source_name, config.dtype)
        settings = _settings(config, shape)
        found = survey(source.model, settings)
        before = sizes(source.model)
        foreseen = _estimate(shape, settings, _text_size(windows), None, workers.size)
        say(f"decomposing {config.model}: {summary(config, settings)}")
        say(
            f"{foreseen.parameters:,} parameters, {foreseen.layers} layers in {foreseen.blocks} blocks; estimated peak "
            f"memory {human_bytes(foreseen.peak_bytes)}, scratch files {human_bytes(foreseen.scratch_bytes)}"
        )
        task = task_of(tokenizer, kind_of(source.model) == "masked")
        with PeakMemory() as peak, LiveTable(LAYER_COLUMNS, LAYER_WIDTHS) as table:
            outcome = decompose_checkpoint(source, found, settings, windows, task, journal, layer_rows(table))
        totals = _totals(outcome.records, before, sizes(source.model), time.perf_counter() - start)
        totals |= {"peak_rss_bytes": peak.bytes, "estimated_peak_rss_bytes": foreseen.peak_bytes}
        report = {
            "format_version": FORMAT_VERSION,
            "base": base,
            "command": command_line("decompose", config),
            "config": _lasting(config),
            "versions": versions(),
            "seed": config.seed,
            "calibration": calibration,
            "layers": {name: asdict(record) for name, record in outcome.records.items()},
            "recovery": outcome.recovery,
            "skipped": outcome.skipped,
            "totals": totals,
        }
        if journal.writes:
            write_index(journal.folder, source.model, tokenizer, outcome.plans, outcome.weight_map)
            write_json(journal.folder / "decomposition.json", report)
            (journal.folder / "README.md").write_text(decomposition_card(report))
        journal.finish()
    except BaseException:
        if not journal.abandon():
            note(f"what is finished is kept in {journal.folder}; continue with the same command and --resume")
        raise
    show_decomposition(report, config)
    return report


def plan(model: str, **options: Any) -> dict[str, Any]:
    """What `decompose` with these options would need and produce, from shapes alone; returns the keys of `--json`."""
    if all(options.get(name) is None for name in ("rank", "kept_fraction", "bits_per_weight")):
        assumed = {"kept_fraction": 0.9} if options.get("backbone", "none") == "none" else {"rank": 16}
        options |= assumed
        name, value = next(iter(assumed.items()))
        say(f"no budget came: planned for --{name.replace('_', '-')} {value}")
    config = PlanConfig.build({"model": model, **options})
    quiet()
    check_json_file(config.json_file)
    source_name = resolve_model(config.model)
    shape = skeleton(source_name, config.dtype)
    size = None
    if config.needs_text or config.calibration or config.given("calibration_tokens"):
        length = window_length(config.context_length, shape)
        tokens = -(-config.calibration_tokens // length) * length
        heldout = max(1, -(-config.calibration_tokens // 16 // length)) * length
        short = min(_SENSITIVITY_LENGTH, length)
        weighted = max(1, config.sensitivity_tokens // short) * short
        size = TextSize(tokens, heldout, length, weighted, short)
    device = default_device()
    settings = _settings(config, shape)
    foreseen = _estimate(shape, settings, size, Rates.measure(next(shape.parameters()).dtype, device), config.processes)
    result = {"model": config.model, **foreseen.to_dict()}
    if config.json_file:
        write_json(Path(config.json_file), result)
        return result
    show_estimate(foreseen, survey(shape, settings), config, settings)
    return result


def train(**options: Any) -> dict[str, Any]:
    """Train the factors of a factored checkpoint, or adapters on them; returns the content of train_results.json."""
    config = TrainConfig.build(options)
    resolved = config.model_dump()
    quiet()
    own = [name for name in TrainConfig.model_fields if name != "dry_run"]
    held = bool(config.eval_dataset_name or config.dataset_test_split)
    if config.dry_run:
        arguments = trainer_arguments(config.trainer_values(), config.mode, True, own, held, config.objective)
        shown = show_plan(config)
        foreseen = None
        if Path(config.model_name_or_path).is_dir():
            foreseen = _foresee(config, resolve_model(config.model_name_or_path), arguments)
        else:
            note(f"{config.model_name_or_path} is not on this machine, so its memory is not foreseen")
        if foreseen is not None:
            show_memory(foreseen)
        return shown | {"memory": None if foreseen is None else foreseen.to_dict()}
    source = resolve_model(config.model_name_or_path)
    if (Path(source) / ADAPTER_FILE).is_file():
        raise UsageError(
            f"{source} is a training output; continue it by running its own config again, or export it "
            "--format factored and train that."
        )
    # before any loading
    arguments = trainer_arguments(config.trainer_values(), config.mode, True, own, held, config.objective)
    foreseen = _foresee(config, source, arguments)
    model, tokenizer = load(source, _training_dtype(config))
    if config.dequantize_once:
        _keep_dense(model)
    causal = kind_of(model) == "causal"
    arguments = trainer_arguments(config.trainer_values(), config.mode, causal, own, held, config.objective)
    resolved["base"] = fingerprint(source)
    names = TrainOptions.__dataclass_fields__
    chosen = TrainOptions(**{key: value for key, value in resolved.items() if key in names})
    command = command_line("train", config)
    metrics = train_model(model, tokenizer, chosen, arguments, resolved, _notify_training, foreseen)
    if is_main_process():
        write_text(Path(config.output_dir) / "README.md", training_card(resolved, metrics, command))
        loss = metrics["train_loss"]
        say(f"trained {metrics['steps']} steps, mean loss {loss:.4f}; adapter in {config.output_dir}")
        if foreseen is not None:
            show_memory(foreseen, metrics["memory"]["measured"])
        say(f"next: lord-tune export {config.output_dir} OUT --format dense")
    return metrics


def _training_dtype(config: TrainConfig) -> str | None:
    """bfloat16 gradients are up to 134 times slower than float32 on CPUs without AVX512; L and R train in float32."""
    return config.dtype or ("float32" if default_device().type == "cpu" else None)


def _foresee(config: TrainConfig, source: str, arguments: Any) -> MemoryEstimate | None:
    """What a run of `config` will hold; None, with a warning, for a model that cannot be run on shapes alone."""
    values = config.model_dump()
    options = TrainOptions(**{key: values[key] for key in TrainOptions.__dataclass_fields__ if key in values})
    try:
        return predict_memory(source, options, arguments, _training_dtype(config), config.dequantize_once)
    except LordError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        note(f"the memory of this run cannot be foreseen: {first_line(error)}")
        return None


def evaluate(model: str, text: list[str], **options: Any) -> dict[str, Any]:
    """Perplexity on texts, sizes and speed; returns the keys of `--json`."""
    config = EvaluateConfig.build({"model": model, "text": text, **options})
    if config.dry_run:
        return show_plan(config)
    quiet()
    check_json_file(config.json_file)
    loaded, tokenizer = load(config.model, config.dtype)
    if config.dequantize_once:
        _keep_dense(loaded)
    length = window_length(config.context_length, loaded)
    windows = {path: file_windows(path, tokenizer, length, config.max_tokens) for path in config.text}
    with progress() as update:
        result = evaluate_model(loaded, tokenizer, windows, length, update)
    if config.json_file:
        write_json(Path(config.json_file), result)
    rows = [
        [Path(name).name, f"{entry['perplexity']:.3f}", f"{entry['loss']:.4f}", f"{entry['tokens']:,}"]
        for name, entry in result["texts"].items()
    ]
    show_table(f"{config.model}, context {length}", ["text", "perplexity", "loss", "tokens"], rows)
    say(
        f"{result['parameters']:,} stored numbers, {human_bytes(result['model_bytes'])}, linears at "
        f"{result['linear_bits_per_weight']:.2f} bits per weight; {result['tokens_per_second']:.1f} tokens/s, "
        f"peak memory {human_bytes(result['peak_rss_bytes'])}"
    )
    return result


def export(model: str, out: str, format: str, **options: Any) -> dict[str, Any]:
    """Write a factored checkpoint or training output as dense, factored or peft; returns export.json's content."""
    config = ExportConfig.build({"model": model, "out": out, "format": format, **options})
    if config.dry_run:
        return show_plan(config)
    quiet()
    check_destination(Path(config.out), config.overwrite)
    loaded, tokenizer = load(config.model)
    text = None if config.text is None else "\n\n".join(documents([config.text], tokenizer))
    command = command_line("export", config)
    with atomic_directory(Path(config.out), config.overwrite) as folder:
        comparison = export_model(
            loaded,
            tokenizer,
            folder,
            config.format,
            config.dtype or "float32",
            config.threshold,
            text,
            Path(config.out),
            lambda form: export_card(form, config.model, command),
        )
        result: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "source": config.model,
            "format": config.format,
            "dtype": config.dtype or ("float32" if config.format == "dense" else None),
            "command": command,
            "comparison": asdict(comparison),
            "bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
            "versions": versions(),
        }
        write_json(folder / "export.json", result)
    say(
        f"wrote {config.out} ({config.format}, {human_bytes(result['bytes'])}); reloaded and compared on "
        f"{comparison.tokens} tokens: KL {comparison.kl:.2g} nats per token, largest logit difference "
        f"{comparison.max_logit_difference:.2g}, top-1 agreement {comparison.top1_agreement:.3f}"
    )
    return result


def _keep_dense(model: Any) -> None:
    held = dequantize_once(model, model.dtype)
    if not held:
        raise UsageError("--dequantize-once came and the model has no quantized layers; remove it.")
    say(f"quantized weights are decoded once: {human_bytes(held)} more memory")


def inspect(model: str, **options: Any) -> dict[str, Any]:
    """The per-layer record of a factored checkpoint, from its decomposition.json (or its manifest alone)."""
    config = InspectConfig.build({"model": model, **options})
    check_json_file(config.json_file)
    folder = Path(config.model)
    if (folder / ADAPTER_FILE).is_file() and not (folder / "decomposition.json").is_file():
        folder = Path(base_of_adapter(folder))
    if not folder.is_dir():
        raise UsageError(f"The folder {folder} does not exist; check the path.")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json; pass a factored checkpoint.")
    if (folder / "decomposition.json").is_file():
        report = read_json(folder / "decomposition.json")
    else:
        manifest = read_json(folder / "config.json").get("quantization_config") or {}
        if manifest.get("quant_method") != "lord":
            raise UsageError(f"{folder} is not a factored checkpoint; run lord-tune decompose first.")
        report = {"layers": manifest["layers"], "totals": {}}
    if config.json_file:
        write_json(Path(config.json_file), report)
        return report
    rows = [inspect_row(name, entry) for name, entry in report["layers"].items()]
    columns = ["layer", "shape", "rank", "backbone", "bits/weight", "calibrated", "held-out", "plain"]
    show_table(str(folder), columns, rows)
    if report["totals"]:
        show_totals(report["totals"])
    return report


def command_line(verb: str, config: RunConfig) -> str:
    """The command that repeats a run: positional fields, then every field that differs from its default."""
    words = ["lord-tune", verb]
    positional = [n for n in ("model", "out") if n in type(config).model_fields and verb != "quickstart"]
    words += [str(getattr(config, name)) for name in positional]
    values = {name: getattr(config, name) for name in type(config).model_fields} | (config.model_extra or {})
    for name, value in values.items():
        field = type(config).model_fields.get(name)
        if name in (*positional, "overwrite", "resume", "dry_run"):
            continue
        if field is not None and value == field.get_default(call_default_factory=True):
            continue
        flag = "--" + ((field.alias if field and field.alias else name).replace("_", "-"))
        if isinstance(value, bool) and field is not None:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Of the libraries that decide the result."""
    found = {"lord_tune": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _identity(name: str, source: str, config: Any) -> dict[str, Any]:
    """Which weights these were: the sha256 of local files, the revision of a Hub model."""
    files = weight_files(source)
    return {
        "name": name,
        "sha256": sha256_files(files) if files else None,
        "revision": getattr(config, "_commit_hash", None),
    }


def _lasting(config: RunConfig) -> dict[str, Any]:
    """The configuration without what does not change the result."""
    return config.model_dump(exclude={"resume", "overwrite", "dry_run"})


def _text_size(windows: Windows | None) -> TextSize | None:
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


def _estimate(shape: Any, settings: Settings, text: TextSize | None, rates: Rates | None, processes: int) -> Estimate:
    """For a skeleton on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # the run itself says them
        found = survey(shape, settings)
    length = text.length if text is not None else min(64, max_length(shape))
    groups, flops = trace(shape, found, run_on_meta, length)
    held = psutil.Process().memory_info().rss
    ranks = known_ranks(found.layers, settings)
    return estimate(shape, found, settings, text, ranks, groups, flops, held, rates, processes)


def show_plan(config: RunConfig) -> dict[str, Any]:
    """What `--dry-run` prints; returned as a dict."""
    resolved = config.model_dump()
    show_table("resolved configuration", ["key", "value"], [[key, str(value)] for key, value in resolved.items()])
    return resolved


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


def _check_formats(config: MethodConfig) -> None:
    """Refuse bad hyperparameters of the formats before any work."""
    for form in (config.backbone, config.factor_format):
        if form is not None and form != "none" and form not in DTYPES:
            make_quantizer(form, _format_options(config, form))


def _settings(config: MethodConfig, shape: Any) -> Settings:
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
        shrinkages=_SHRINKAGES if config.shrinkage == "auto" else (),
    )
    if not choose_format:
        return settings
    assert config.bits_per_weight is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # the run itself says them
        layers = survey(shape, replace(settings, rank=0, bits_per_weight=None)).layers  # no budget to refuse yet
    smallest = {} if config.rank is None else {"smallest_rank": config.rank}
    return fit_format(layers, settings, quantizers, config.bits_per_weight, **smallest)


def _windows(config: DecomposeConfig, model: Any, tokenizer: Any) -> tuple[Windows | None, dict[str, Any]]:
    if not config.calibration:
        return None, {"tokens": 0, "source": [], "sha256": None}
    texts = documents(list(config.calibration), tokenizer)
    length = window_length(config.context_length, model)
    calibration, heldout = token_windows(
        texts, tokenizer, config.calibration_tokens, config.calibration_tokens // 16, length, config.seed
    )
    short = min(_SENSITIVITY_LENGTH, length)
    pieces = calibration[:, : length // short * short].reshape(-1, short)
    # an even sample over all windows, not the first ones only
    count = min(max(1, config.sensitivity_tokens // short), len(pieces))
    sensitivity = pieces[torch.linspace(0, len(pieces) - 1, count).long()]
    described = {
        "tokens": calibration.numel(),
        "heldout_tokens": heldout.numel(),
        "context_length": length,
        "source": list(config.calibration),
        "sha256": text_sha256(texts),
    }
    return Windows(calibration, heldout, sensitivity), described


def _totals(
    records: dict[str, LayerRecord], before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, Any]:
    factored = [record for record in records.values() if record.rank != "dense"]
    dense_numbers = sum(r.shape[0] * r.shape[1] for r in records.values())
    kept = sum(r.shape[0] * r.shape[1] if isinstance(r.rank, str) else r.rank * sum(r.shape) for r in records.values())
    return {
        "layers": len(records),
        "factored_layers": len(factored),
        "linear_parameters": dense_numbers,
        "kept_fraction": kept / dense_numbers if all(r.backbone == "none" for r in factored) else None,
        "parameters_before": before["parameters"],
        "parameters": after["parameters"],
        "model_bytes_before": before["model_bytes"],
        "model_bytes": after["model_bytes"],
        "linear_bits_per_weight": after["linear_bits_per_weight"],
        "seconds": seconds,
    }


def _notify_training(event: str, payload: Any) -> None:
    if event == "data":
        say(f"data: {payload['rows']:,} rows of {payload['source']}, recognised as {payload['format']}")
    elif event == "sample":
        show_spans("first training sequence (trained tokens are marked):", payload)
    elif event == "coverage":
        show_coverage(payload)
