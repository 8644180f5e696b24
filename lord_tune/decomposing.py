"""One decomposition from its options to its files: the body of the verbs `decompose` and `correct`."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .cards import decomposition_card
from .config import DecomposeConfig
from .console import LiveTable, human_bytes, note, say, show_next
from .correction.base import Corrected, Quantized
from .decomposition import Journal, Phase, decompose_checkpoint, is_block
from .decomposition.base import Source
from .decomposition.decide import Given, decide
from .decomposition.estimate import Estimate
from .decomposition.sizes import totals_of
from .decomposition.survey import survey
from .errors import LordError, LordWarning
from .integrations.checkpoint import Checkpoint, skeleton, write_index
from .integrations.companions import companions_of
from .integrations.files import relative_folder
from .integrations.models import attention_of, launched_processes, load_tokenizer, model_class
from .integrations.running import kind_of, run_model, task_of
from .integrations.sources import resolve_model
from .integrations.space import bytes_in, check_space
from .integrations.vocabulary import check_vocabulary
from .layers.sizes import bytes_by_part, sizes
from .memory import PeakMemory
from .plan_tables import backbones_of, show_compared
from .plans import FORMAT_VERSION
from .provenance import architecture_of, identity_of, lasting, made_from, versions
from .resolve import (
    estimate_of,
    outside_of,
    request_of,
    text_size_of,
    windows_of,
)
from .size_tables import show_embeddings
from .storage import (
    read_json,
    sha256_files,
    write_json,
    write_text,
)
from .tables import (
    LAYER_COLUMNS,
    LAYER_WIDTHS,
    layer_rows,
    show_decomposition,
    summary,
)


def run_decomposition(
    config: DecomposeConfig,
    command: str,
    quantized: Quantized | None = None,  # whose codes are Q
    served: str | None = None,  # how L and R are stored beside these
    finish: Callable[[Path], dict[str, Any]] = lambda folder: {},  # adds files and entries of the report
) -> dict[str, Any]:
    """Everything that `decompose` does; returns the content of decomposition.json."""
    workers, device = launched_processes()
    journal = Journal(Path(config.out), workers)
    perhaps_finished = config.resume and not config.overwrite and (journal.out / "decomposition.json").is_file()
    if not perhaps_finished:
        journal.check(config.resume, config.overwrite)
    source_name = resolve_model(config.model)
    _, base_config = model_class(source_name)
    tokenizer = load_tokenizer(source_name)
    shape = skeleton(source_name, config.dtype)
    windows, calibration = windows_of(config, shape, tokenizer)
    check_vocabulary(shape, tokenizer, [] if windows is None else [windows.calibration, windows.heldout])
    beside = companions_of(source_name)
    base = workers.send(identity_of(config.model, source_name) if journal.writes else None, 0)
    if perhaps_finished:
        report = read_json(journal.out / "decomposition.json")
        now = json.loads(json.dumps({"config": lasting(config), "base": base, "calibration": calibration}))
        if now == {key: report[key] for key in now}:
            journal.remove_work()
            say(f"{config.out} is finished already.")
            return report
        journal.check(config.resume, config.overwrite)
    identity = {
        "architecture": architecture_of(base_config),
        "attention": attention_of(source_name),
        "device": device.type,
        "config": lasting(config),
        "base": base,
        "calibration": calibration,
        "versions": versions(),
        "processes": workers.size,
    }
    if config.plan_file is not None:
        identity["plan"] = sha256_files([Path(config.plan_file)])
    start = time.perf_counter()
    if journal.open(identity, config.resume):
        blocks = sum(is_block(step, Phase.WRITING) for step in journal.steps)
        note(f"continuing the run in {journal.folder}: {blocks} blocks are written")
    try:
        source: Source = Checkpoint(source_name, config.dtype, journal.work / f"converted-{workers.rank}", device)
        request = request_of(config)
        found = survey(source.model, request.targets, request.exclude, run_model)
        for text in found.notes():
            warnings.warn(text, LordWarning, stacklevel=2)
        corrected = None
        if quantized is not None:
            source = corrected = Corrected(source, quantized, found.layers, served)
            budget = Given(corrected.plan(request.template, config.rank or 0))
            request = replace(request, budget=budget, compares=kind_of(source.model) != "bare")
        before = sizes(source.model)
        outside = outside_of(source.model, found, request)
        chosen = decide(found.layers, request, outside.rest, outside.embeddings)
        on_meta = survey(shape, request.targets, request.exclude, run_model)
        size = text_size_of(windows)
        foreseen = estimate_of(shape, on_meta, request, chosen, size, None, workers.size, device)
        doing = f"decomposing {config.model}" if quantized is None else f"correcting {quantized.name} by {config.model}"
        say(f"{doing}: {summary(config, backbones_of(chosen))}")
        say(
            f"{foreseen.parameters:,} parameters, {foreseen.layers} layers in {foreseen.blocks} blocks; estimated peak "
            f"memory {human_bytes(foreseen.peak_bytes)}, scratch files {human_bytes(foreseen.scratch_bytes)}"
        )
        _check_space(journal, foreseen)
        task = task_of(tokenizer, kind_of(source.model))
        with PeakMemory(device) as peak, LiveTable(LAYER_COLUMNS, LAYER_WIDTHS) as table:
            show = layer_rows(table)
            given = windows, task, journal, show, outside.rest, corrected, outside.tables
            outcome = decompose_checkpoint(source, found, request, chosen, *given)
        totals = totals_of(outcome.records, before, sizes(source.model), time.perf_counter() - start)
        totals |= {"bytes_by_part": bytes_by_part(source.model)}
        totals |= {"peak_memory_bytes": peak.bytes, "estimated_peak_memory_bytes": foreseen.peak_bytes}
        report = {
            "format_version": FORMAT_VERSION,
            "base": base,
            "base_folder": relative_folder(config.model, journal.out),
            "command": command,
            "config": lasting(config),
            "versions": versions(),
            "seed": config.seed,
            "calibration": calibration,
            "shards": journal.shards(),
            "layers": {name: asdict(record) for name, record in outcome.records.items()},
            "recovery": outcome.recovery,
            **({"embeddings": outcome.rounded} if outcome.rounded else {}),
            **outcome.compared.to_dict(),
            "skipped": found.skipped,
            "totals": totals,
        }
        if journal.writes:
            write_index(journal.folder, source.model, tokenizer, outcome.plans, outcome.weight_map)
            beside.copy(journal.folder)
            replace(outcome.plan, made=made_from(config, base, calibration)).save(journal.folder / "plan.json")
            report |= (added := finish(journal.folder))
            write_text(journal.folder / "README.md", decomposition_card(report, source_name, journal.folder))
            write_json(journal.folder / "decomposition.json", report)
        if quantized is not None:
            known = workers.send(added if journal.writes else None, 0)
            assert known is not None, "the first process has it"
            report |= known
        journal.finish()
    except BaseException:
        if quantized is not None:  # what is fitted is kept in memory alone
            journal.discard()
        elif not journal.abandon():
            note(f"what is finished is kept in {journal.folder}; continue with the same command and --resume")
        raise
    show_decomposition(outcome.records, outcome.recovery, found.skipped, totals)
    show_embeddings(outcome.rounded)
    if outcome.plan.factored():
        show_compared(outcome.plan, outcome.compared)
    say(f"wrote {config.out}")
    show_next("inspect", config.out, then="or evaluate it, with --text FILE of text that it has not seen, or train it")
    return report


def _check_space(journal: Journal, foreseen: Estimate) -> None:
    """LordError, in every process, where the scratch files and, as far as its size is known, the checkpoint do not fit
    beside what an earlier run left in the folder."""
    problem = None
    if journal.writes:
        needed = foreseen.scratch_bytes + (foreseen.model_bytes_after or 0) - bytes_in(journal.folder)
        try:
            check_space(journal.folder, needed, f"Writing {journal.out}, with its scratch files,")
        except LordError as error:
            problem = error
    problem = journal.workers.send(problem, 0)
    if problem is not None:
        raise problem
