"""What the verbs print of their results: tables and the sentences under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

import torch

from .adapters.attach import Coverage
from .allocation import PLAIN, break_even
from .config import MIX, MethodConfig, PlanConfig
from .console import LiveTable, duration, human_bytes, say, show_spans, show_table
from .decomposition import Estimate, LayerRecord, Notify, Progress, Survey
from .decomposition.recovery import Recovered
from .decomposition.sizes import Totals
from .decomposition.steps import Phase
from .layers import SHARED, expert_of
from .size_tables import kind_of, show_bytes, show_equal_bits
from .training import MemoryEstimate

LAYER_COLUMNS = ["layer", "shape", "rank", "calibrated", "held-out", "plain SVD", "seconds"]


LAYER_WIDTHS = [40, 11, 5, 10, 8, 9, 7]


def layer_rows(table: LiveTable) -> Notify:
    """Shows the steps of a run: a row per finished layer, and how far it is."""

    def show(step: Progress) -> None:
        for name, record in step.layers.items():
            errors = (record.error_calibrated, record.error_heldout, record.error_plain)
            cells = ["-" if record.rank == "dense" or e is None else f"{e:.4f}" for e in errors]
            shape = f"{record.shape[0]}x{record.shape[1]}"
            table.row([name, shape, str(record.rank), *cells, f"{record.seconds:.2f}"])
        left = "" if step.remaining is None else f", about {duration(step.remaining)} left"
        what = "model" if step.phase in (Phase.PROBING, Phase.SEARCHING) else "block"
        table.status(f"{step.phase}: {what} {step.done}/{step.total}{left}", step.phase, step.done, step.total)

    return show


def show_estimate(foreseen: Estimate, found: Survey, config: PlanConfig, backbone: str) -> None:
    kinds: dict[str, list[str]] = {}
    for name in found.layers:
        kinds.setdefault(kind_of(name), []).append(name)
    rows = []
    for kind, names in kinds.items():
        shape = found.layers[names[0]].shape
        rank = "from calibration"
        if foreseen.ranks is not None:
            chosen = {foreseen.ranks[name] for name in names}
            rank = ", ".join("dense" if r is None else str(r) for r in sorted(chosen, key=lambda r: r or 0))
        rows.append(
            [kind, f"{shape[0]}x{shape[1]}", str(len(names)), rank, str(break_even(shape, config.stored_form or PLAIN))]
        )
    show_table(
        f"plan for {config.model}: {summary(config, backbone)}",
        ["layer", "shape", "count", "rank", "break-even rank"],
        rows,
    )
    after = "decided by the calibration"
    if config.kept_fraction is not None and foreseen.model_bytes_after is None:
        share = foreseen.linear_parameters * (1 - config.kept_fraction)
        after = f"about {human_bytes(foreseen.model_bytes * (1 - share / foreseen.parameters))}"
    elif foreseen.model_bytes_after is not None:
        bits = foreseen.linear_bits_per_weight
        after = f"{human_bytes(foreseen.model_bytes_after)}, linears at {bits:.2f} bits per weight"
    say(
        f"{foreseen.parameters:,} parameters, {foreseen.linear_parameters:,} of them in {foreseen.layers} layers of "
        f"{foreseen.blocks} blocks; {human_bytes(foreseen.model_bytes)} -> {after}"
    )
    say("up to the break-even rank the factors hold fewer numbers than W")
    if foreseen.bytes_by_part is not None:
        decided = foreseen.model_bytes_after is not None
        show_bytes(foreseen.bytes_by_part, "" if decided else ", before the calibration decides about the layers")
    if found.skipped:
        say(f"not decomposed: {_count_reasons(found.skipped)}")
    phase = max(foreseen.phases, key=lambda name: foreseen.phases[name])
    say(
        f"peak memory {human_bytes(foreseen.peak_bytes)} per process: {human_bytes(foreseen.held_bytes)} for Python "
        f"and the libraries, {human_bytes(foreseen.phases[phase])} for the work (most in the phase '{phase}')"
    )
    say(f"scratch files beside the output: {human_bytes(foreseen.scratch_bytes)}")
    if foreseen.seconds is not None:
        say(
            f"time about {duration(foreseen.seconds)} with {_count(config.processes, 'process', 'processes')} of "
            f"{_count(torch.get_num_threads(), 'thread', 'threads')}, by the speed of this machine measured just now"
        )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _count_reasons(skipped: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in skipped.values():
        reason = f"{SHARED} others" if reason.startswith(SHARED) else reason
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def summary(config: MethodConfig, backbone: str) -> str:
    stored = "" if config.embeddings == "dense" else f", embeddings in {config.embeddings}"
    if config.embeddings_alone:
        return f"every layer as it is{stored}"
    return _layers_summary(config, backbone) + stored


def _layers_summary(config: MethodConfig, backbone: str) -> str:
    if config.plan_file is not None:
        return f"the plan {config.plan_file} (backbone: {backbone})"
    if config.bits_per_weight is not None:
        budget = f"{config.bits_per_weight:g} bits per weight"
        budget += "" if config.rank is None else f" with rank {config.rank}"
    elif config.max_bytes is not None:
        budget = f"at most {human_bytes(config.bytes_asked() or 0)}"
    elif config.average_rank is not None:
        budget = f"average rank {config.average_rank}"
    elif config.kept_fraction is not None:
        budget = f"{config.kept_fraction:g} kept"
    else:
        budget = "all components" if config.full_rank else f"rank {config.rank}"
    if config.sized:
        budget += f", {config.allocation}" + (f" at rank {config.rank}" if config.allocation == "spread" else "")
    parts = "L R only" if backbone == "none" else f"{backbone} + L R"
    if config.mixes:
        parts = "dense, L R and " + ", ".join(config.mix or MIX)
    return f"{parts}, method {config.used_method}, {budget}"


def show_decomposition(
    layers: Mapping[str, LayerRecord],
    recovery: Mapping[str, Recovered],  # by block
    skipped: Mapping[str, str],
    totals: Totals,
) -> None:
    """One line per kind of layer (the last part of its name): ranks and errors."""
    kinds: dict[str, list[LayerRecord]] = {}
    for name, record in layers.items():
        kinds.setdefault(kind_of(name), []).append(record)
    rows = []
    for kind, records in kinds.items():
        chosen = [record for record in records if record.rank != "dense"]
        ranks = [record.rank for record in chosen if isinstance(record.rank, int)]
        cells = [
            _mean(record.error_calibrated for record in chosen),
            _mean(record.error_heldout for record in chosen),
            _mean(record.error_plain for record in chosen),
            _mean(record.error_backbone for record in chosen),
        ]
        shape = "x".join(map(str, records[0].shape))
        rows.append([kind, shape, f"{len(ranks)}/{len(records)}", _span(ranks), *cells])
    columns = ["layer", "shape", "factored", "rank", "calibrated", "held-out", "plain SVD", "Q alone"]
    columns, rows = _without_empty(columns, rows, 4)
    measured = len(columns) > 4
    show_table("mean relative output error by kind of layer" if measured else "layers by kind", columns, rows)
    if not measured:
        say("errors of layers are measured on calibration text, and there was none")
    show_equal_bits(layers)
    _show_recovery(recovery)
    show_totals(totals)
    show_bytes(totals["bytes_by_part"])
    if skipped:
        say(f"not decomposed: {_count_reasons(skipped)}")
    told = _show_poor_experts(layers)
    poor = [n for n, record in layers.items() if _is_poorly_determined(record) and n not in told]
    if poor:
        say(f"{len(poor)} layers saw fewer tokens than inputs, or dead inputs, like {poor[0]}; give them more text")
    fitted = [name for name, record in layers.items() if _is_overfitted(record)]
    if fitted:
        count = _count(len(fitted), "layer errs", "layers err")
        say(f"{count} over twice as much on held-out text, like {fitted[0]}; give more text")
    say(
        f"peak memory {human_bytes(totals['peak_memory_bytes'])} (estimated "
        f"{human_bytes(totals['estimated_peak_memory_bytes'])})"
    )


def _show_poor_experts(layers: Mapping[str, LayerRecord]) -> set[str]:
    """One line for all experts of a mixture that saw few tokens; returns their layers. An expert that never ran stays
    dense, which is warned about by name."""
    experts, poor, layers_of_poor = set(), set(), {}
    for name, record in layers.items():
        part = expert_of(name)
        if part is None or not record.inputs:
            continue
        expert = part[0].rpartition(".")[0], part[1]  # its layers read the same tokens
        experts.add(expert)
        if record.inputs["tokens"] < record.shape[1]:
            poor.add(expert)
            layers_of_poor[name] = record.inputs["tokens"]
    if poor:
        least = min(layers_of_poor, key=lambda name: layers_of_poor[name])
        say(
            f"{len(poor)} of {len(experts)} experts saw fewer tokens than inputs, the least {layers_of_poor[least]} "
            f"({least}); give them more text"
        )
    return set(layers_of_poor)


def _show_recovery(blocks: Mapping[str, Recovered]) -> None:
    """What block-wise recovery did; layer errors are those before it."""
    if not blocks:
        return
    ratios = [block["after"] / max(block["before"], 1e-300) for block in blocks.values()]
    kept = sum(1 for block in blocks.values() if block["epochs"])
    seconds = sum(block["seconds"] for block in blocks.values())
    say(
        f"block-wise recovery: {kept} of {len(blocks)} blocks are better on held-out text; error of their outputs, "
        f"squared, is {min(ratios):.2f} to {max(ratios):.2f} of what it was; {duration(seconds)}. The errors above are "
        "those of single layers, before it"
    )


def _is_poorly_determined(record: LayerRecord) -> bool:
    inputs = record.inputs
    return bool(inputs) and (inputs["tokens"] < record.shape[1] or inputs["dead_inputs"] > 0)


def _is_overfitted(record: LayerRecord) -> bool:
    calibrated, heldout = record.error_calibrated, record.error_heldout
    return bool(calibrated and heldout is not None and heldout > 2 * calibrated)


def _without_empty(columns: list[str], rows: list[list[str]], kept: int) -> tuple[list[str], list[list[str]]]:
    """The table without the columns after the first `kept` that hold nothing but dashes."""
    shown = [i for i in range(len(columns)) if i < kept or any(row[i] != "-" for row in rows)]
    return [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]


def show_layers(title: str, layers: Mapping[str, _Written]) -> None:
    """A row per layer of a factored checkpoint."""
    columns = ["layer", "shape", "rank", "backbone", "bits/weight", "calibrated", "held-out", "plain SVD"]
    columns, rows = _without_empty(columns, [inspect_row(name, entry) for name, entry in layers.items()], 5)
    show_table(title, columns, rows)
    if len(columns) > 5:
        say(
            "calibrated, held-out, plain SVD: relative error of the layer's output on the text it was fitted to, on "
            "other text, and of a truncated SVD of the same rank"
        )
    else:
        say("errors of layers are measured on calibration text, and there was none")


def _mean(errors: Iterable[float | None]) -> str:
    values = [error for error in errors if error is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def show_totals(totals: Totals) -> None:
    kept = totals["kept_fraction"]
    share = f", {1 - kept:.1%} of the linears' parameters removed" if kept is not None else ""
    say(
        f"{totals['factored_layers']} of {totals['layers']} layers factored{share}; "
        f"{totals['parameters_before']:,} -> {totals['parameters']:,} stored numbers, "
        f"{human_bytes(totals['model_bytes_before'])} -> {human_bytes(totals['model_bytes'])}, linears at "
        f"{totals['linear_bits_per_weight']:.2f} bits per weight; {totals['seconds']:.0f} s"
    )


class _Written(TypedDict):
    """A layer in decomposition.json; in the manifest alone without what was measured."""

    shape: list[int]
    rank: int | str
    backbone: str
    bits_per_weight: NotRequired[float]
    error_calibrated: NotRequired[float | None]
    error_heldout: NotRequired[float | None]
    error_plain: NotRequired[float | None]


def inspect_row(name: str, entry: _Written) -> list[str]:
    def shown(value: float | None, digits: int = 4) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    shape = f"{entry['shape'][0]}x{entry['shape'][1]}"
    measured = entry.get("error_calibrated"), entry.get("error_heldout"), entry.get("error_plain")
    bits = shown(entry.get("bits_per_weight"), 2)
    return [name, shape, str(entry["rank"]), entry["backbone"], bits, *map(shown, measured)]


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def show_coverage(covered: Coverage) -> None:
    kinds: dict[str, list[int]] = {}
    for name, rank in covered.trained.items():
        kinds.setdefault(kind_of(name), []).append(rank)
    rows = [[kind, str(len(ranks)), _span(ranks)] for kind, ranks in kinds.items()]
    show_table(f"training mode {covered.mode}", ["layer", "trained", "rank"], rows)
    total = len(covered.trained) + len(covered.untouched)
    say(f"{len(covered.trained)} of {total} factored layers train: {covered.trainable_parameters:,} parameters")


_PARTS_OF_A_STEP = {
    "weights": "as stored, embeddings and head included",
    "teacher": "its weights",
    "adapters": "what trains",
    "gradients": "",
    "optimizer": "its state",
    "activations": "kept from forward to backward",
    "logits": "of the tokens whose loss is computed at once",
}


def show_memory(foreseen: MemoryEstimate, measured: dict[str, int] | None = None) -> None:
    """What a training step holds; after a run beside what it held."""
    expected = foreseen.to_dict()
    found = measured or {}
    rows = []
    for part, meaning in _PARTS_OF_A_STEP.items():
        if part == "teacher" and not foreseen.teacher:
            continue
        size = "not known" if expected[part] is None else human_bytes(expected[part])
        rows.append([part, size, *([human_bytes(found[part]) if part in found else "-"] if measured else []), meaning])
    rows.append(
        ["peak", human_bytes(foreseen.peak), *([human_bytes(found["peak"])] if measured else []), "at most at once"]
    )
    columns = ["part", "foreseen", *(["measured"] if measured else []), ""]
    show_table(f"memory of a step of {foreseen.tokens:,} tokens, per process", columns, rows)
    say(
        "The peak is weights, adapters, optimizer, and the most that forward and backward hold at one time, which is "
        f"less than the sum of the parts. Python and the libraries hold {human_bytes(foreseen.held)} more."
    )
    if measured:
        say(
            "On a CPU the measured peak is memory of the process: beside tensors, code of the libraries that training "
            "runs for the first time and pieces of freed memory, together up to 0.1 GB."
        )
    for text in foreseen.notes:
        say(f"note: {text}")


def _beginning(spans: list[tuple[str, bool]], length: int = 300) -> list[tuple[str, bool]]:
    """The first characters of marked text."""
    kept: list[tuple[str, bool]] = []
    for text, marked in spans:
        if length > 0 and text:
            kept.append((text if len(text) <= length else text[:length] + " ...", marked))
        length -= len(text)
    return kept


def notify_training(event: str, payload: object) -> None:
    """What a training run tells before its first step."""
    if event == "data" and isinstance(payload, dict):
        say(f"data: {payload['source']}: {payload['described']}")
    elif event == "sample" and isinstance(payload, list):
        show_spans("beginning of the first training sequence (trained tokens are marked):", _beginning(payload))
    elif isinstance(payload, Coverage):
        show_coverage(payload)
