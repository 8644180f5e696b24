"""The tables of a report: runs are columns, what is known of them rows. A row that nobody has is no row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RECORDS
from ..console import duration, human_bytes
from .measured import Value
from .numbers import NONE, change, decimals, fixed, option, share, significant
from .parts import PARTS
from .runs import EXPORTED, MEASURED, TRAINED, Layer, Run
from .trained import OF_THE_RUN

ORIGINAL = "original"
_BEFORE = ("dense", "original")  # what decomposition.json calls the model as it is, among the plans it ran
_PLACES = ("out", "output_dir", "overwrite", "resume", "dry_run")  # say nothing about what is computed


@dataclass(frozen=True)
class Cell:
    text: str = NONE
    note: str = ""  # small, below
    differs: bool = False


@dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...]
    title: str = ""  # the whole of a label that is cut
    differs: bool = False
    heading: bool = False  # a group of rows, without cells


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


# ---- results -------------------------------------------------------------------------------------------------------

Getter = Callable[[Run], Value | None]


def original_of(runs: Sequence[Run]) -> tuple[list[Run], Run | None]:
    """The runs that get a column, and the one that is a measurement of the model as it was, where there is one."""
    names = {run.base.get("name") for run in runs if run.stage != MEASURED} - {None}
    for run in runs:
        if run.stage == MEASURED and run.base.get("name") in names and len(names) == 1:
            return [other for other in runs if other is not run], run
    return list(runs), None


def results(runs: Sequence[Run]) -> Table:
    """Before and after: an original where one is known, and a column per run."""
    columns, before = original_of(runs)
    known = {run.base.get("name") for run in columns if run.totals.get("parameters_before")}
    first = next((run for run in columns if run.totals.get("parameters_before")), None) if len(known) == 1 else None
    one = len({_base_key(run) for run in columns if run.base}) <= 1

    def before_of(key: str) -> Value | None:
        return _value(first.totals.get(key)) if first is not None and one else None

    body: list[Row] = []
    for heading, rows in (
        ("quality", _quality(columns, before)),
        ("size", _size(columns, before, before_of)),
        ("layers", _layer_errors(columns)),
        ("work", _work(columns, before)),
    ):
        if rows:
            body += [Row(heading, (), heading=True), *rows]
    has_original = any(row.cells and row.cells[0].text != NONE for row in body)
    if not has_original:
        body = [Row(row.label, row.cells[1:], row.title, row.differs, row.heading) for row in body]
    labels = tuple(run.label for run in columns)
    return Table((ORIGINAL, *labels) if has_original else labels, tuple(body))


def _base_key(run: Run) -> object:
    return run.base.get("sha256") or run.base.get("name")


def _value(number: object) -> Value | None:
    return Value(float(number)) if isinstance(number, int | float) and not isinstance(number, bool) else None


def _row(
    label: str,
    original: Value | None,
    values: Sequence[Value | None],
    show: Callable[[Value], str] | None = None,
    note: Callable[[float, float | None], str] = lambda value, original: "",
    notes: Sequence[str] = (),  # of the cells, beside what `note` says
    title: str = "",
) -> list[Row]:
    """One row, or none where no run has a value."""
    if not any(value is not None for value in values):
        return []
    digits = decimals([value for value in (original, *values) if value is not None])
    write = show or (lambda value: fixed(value, digits))
    start = None if original is None else original.value
    cells = [Cell() if original is None else Cell(write(original))]
    for index, value in enumerate(values):
        said = [notes[index]] if notes and notes[index] else []
        if value is None:
            cells.append(Cell())
        else:
            cells.append(Cell(write(value), ", ".join(filter(None, [note(value.value, start), *said]))))
    return [Row(label, tuple(cells), title)]


def _quality(columns: Sequence[Run], before: Run | None) -> list[Row]:
    rows: list[Row] = []
    short = _short_names([text for run in columns if run.measured for text in run.measured.perplexity])
    for text, name in short.items():
        own = [run.measured.perplexity.get(text) if run.measured else None for run in columns]
        start = before.measured.perplexity.get(text) if before and before.measured else None
        seen = ["the run read this text" if _has_read(run, text) else "" for run in columns]
        rows += _row(f"perplexity, {name}", start, own, note=change, notes=seen, title=text)
    for text, name in short.items():
        divergence = [run.measured.kl.get(text) if run.measured else None for run in columns]
        rows += _row(f"KL to the original, {name} (nats per token)", None, divergence, title=text)
    rows += _heldout(columns)
    tasks = dict.fromkeys(task for run in columns if run.measured for task in run.measured.scores)
    for task in tasks:
        scores = [run.measured.scores.get(task) if run.measured else None for run in columns]
        start = before.measured.scores.get(task) if before and before.measured else None
        rows += _row(task, start, scores)
    checks = [_value(run.comparison.get("kl")) for run in columns]
    rows += _row("KL to its source, as the export was checked", None, checks, show=lambda v: significant(v.value, 2))
    return rows


def _heldout(columns: Sequence[Run]) -> list[Row]:
    """What decompose itself ran on text that it held out."""
    starts = [next((run.heldout_losses[key] for key in _BEFORE if key in run.heldout_losses), None) for run in columns]
    known = {round(start, 9) for start in starts if start is not None}
    start = next(iter(known)) if len(known) == 1 else None
    rows: list[Row] = []
    for label, key in (
        ("perplexity, text held out of the calibration", None),
        ("… as quantized, without L R", "quantized"),
        ("… without L R at the same bytes", "control"),
    ):
        losses = [run.heldout_losses.get(key or run.chosen or "") for run in columns]
        values = [None if loss is None else Value(math.exp(min(loss, 80.0))) for loss in losses]
        own = None if start is None else Value(math.exp(min(start, 80.0)))
        rows += _row(label, own if key is None else None, values, note=change)
    return rows


def _has_read(run: Run, text: str) -> bool:
    """Whether the run was calibrated or trained on the very text it was measured on."""
    sources = run.calibration.get("source") or []
    sources = sources if isinstance(sources, list) else [sources]
    return text in [*sources, run.config.get("dataset_name")]


def _short_names(texts: Iterable[str]) -> dict[str, str]:
    """text -> the last part of its path, where that tells them apart."""
    names = {text: Path(text).name or text for text in texts}
    counts = [*names.values()]
    return {text: name if counts.count(name) == 1 else text for text, name in names.items()}


def _size(columns: Sequence[Run], before: Run | None, before_of: Callable[[str], Value | None]) -> list[Row]:
    def measured(run: Run, key: str) -> Value | None:
        found = run.measured.sizes.get(key) if run.measured else None
        return _value(run.totals.get(key) if found is None else found)

    def start(key: str) -> Value | None:
        return before_of(f"{key}_before") or (measured(before, key) if before else None)

    rows = _row(
        "bytes of the tensors",
        start("model_bytes"),
        [measured(run, "model_bytes") for run in columns],
        lambda value: human_bytes(value.value),
        share,
    )
    rows += _row(
        "stored numbers",
        start("parameters"),
        [measured(run, "parameters") for run in columns],
        lambda value: f"{value.value:,.0f}",
        share,
    )
    bits = [measured(run, "linear_bits_per_weight") for run in columns]
    rows += _row(
        "bits per weight of the linear layers", start("linear_bits_per_weight"), bits, lambda v: f"{v.value:.2f}"
    )
    kept = [_value(run.totals.get("kept_fraction")) for run in columns]
    rows += _row("linear layers' numbers that are kept", None, kept, lambda v: share(v.value, 1.0))
    adapter = [_value(run.totals.get("adapter_bytes")) for run in columns]
    return rows + _row("bytes of the adapter", None, adapter, lambda v: human_bytes(v.value))


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _layer_errors(columns: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []
    for label, key in (("calibration text", "calibrated"), ("held-out text", "heldout")):
        means = [mean(getattr(layer, key) for layer in run.layers if layer.rank is not None) for run in columns]
        rows += _row(
            f"mean error of the layers' outputs, {label}", None, [None if m is None else Value(m) for m in means]
        )
    return rows


def _work(columns: Sequence[Run], before: Run | None) -> list[Row]:
    def speed(run: Run | None, key: str) -> Value | None:
        return _value(run.measured.speed.get(key)) if run is not None and run.measured else None

    def seconds(run: Run) -> Value | None:
        return _value(run.totals.get("seconds") or run.training.get("train_runtime"))

    def peak(run: Run) -> Value | None:
        memory = run.training.get("memory")
        measured = memory.get("measured") if isinstance(memory, Mapping) else None
        return _value(run.totals.get("peak_memory_bytes") or (measured or {}).get("peak"))

    tokens = [speed(run, "tokens_per_second") for run in columns]
    rows = _row("tokens per second", speed(before, "tokens_per_second"), tokens, lambda v: f"{v.value:.1f}")
    rows += _row("time of the run", None, [seconds(run) for run in columns], lambda v: duration(v.value))
    rows += _row("peak memory of the run", None, [peak(run) for run in columns], lambda v: human_bytes(v.value))
    for label, key in (("training steps", "steps"), ("trained numbers", "trainable_parameters")):
        counts = [_value(run.training.get(key)) for run in columns]
        rows += _row(label, None, counts, lambda v: f"{v.value:,.0f}")
    return rows + _row("mean training loss", None, [_value(run.training.get("train_loss")) for run in columns])


# ---- options, parts, layers ----------------------------------------------------------------------------------------


def options(runs: Sequence[Run], verb: str) -> Table | None:
    """The options of the runs of one verb that are not the default in all of them; None where there are none."""
    own = [run for run in runs if run.verb == verb and run.config]
    fields = RECORDS[verb].model_fields
    rows: list[Row] = []
    for key in dict.fromkeys(key for run in own for key in run.config):
        if key in _PLACES or key in OF_THE_RUN:
            continue
        default = fields[key].get_default(call_default_factory=True) if key in fields else None
        values = [run.config.get(key) for run in own]
        if all(value == default or value is None for value in values):
            continue
        texts = [option(value) for value in values]
        differs = len(set(texts)) > 1
        shown = tuple(Cell(text, differs=differs) for text in texts)
        rows.append(Row((fields[key].alias if key in fields else None) or key, shown, differs=differs))
    rows.sort(key=lambda row: not row.differs)
    return Table(tuple(run.label for run in own), tuple(rows)) if rows else None


def parts(runs: Sequence[Run]) -> Table | None:
    own = [run for run in runs if run.parts]
    rows = []
    totals = [sum(run.parts.values()) for run in own]
    for part in PARTS:
        if any(part in run.parts for run in own):
            found = [run.parts.get(part) for run in own]
            cells = [
                Cell() if size is None else Cell(human_bytes(size), share(size, total))
                for size, total in zip(found, totals, strict=True)
            ]
            rows.append(Row(part, tuple(cells)))
    rows.append(Row("together", tuple(Cell(human_bytes(total)) for total in totals)))
    return Table(tuple(run.label for run in own), tuple(rows)) if own else None


def by_kind(layers: Sequence[Layer]) -> Table:
    """A row per kind of linear layer."""
    rows = []
    for kind, own in grouped(layers).items():
        ranks = [layer.rank for layer in own if layer.rank is not None]
        cells = (
            " / ".join(dict.fromkeys("×".join(map(str, layer.shape)) for layer in own)),
            f"{len(ranks)} of {len(own)}",
            span(ranks),
            ", ".join(dict.fromkeys(layer.backbone for layer in own if layer.rank is not None)) or NONE,
            significant(mean(layer.bits for layer in own)),
            significant(mean(layer.calibrated for layer in own)),
            significant(mean(layer.heldout for layer in own)),
        )
        rows.append(Row(kind, tuple(map(Cell, cells))))
    columns = ("out × in", "decomposed", "rank", "backbone", "bits per weight", "calibrated", "held-out")
    return _without_empty(columns, rows)


def every_layer(layers: Sequence[Layer]) -> Table:
    rows = []
    for layer in layers:
        cells = (
            "×".join(map(str, layer.shape)),
            "dense" if layer.rank is None else str(layer.rank),
            layer.backbone,
            significant(layer.bits),
            significant(layer.calibrated),
            significant(layer.heldout),
        )
        rows.append(Row(layer.name, tuple(map(Cell, cells))))
    return _without_empty(("out × in", "rank", "backbone", "bits per weight", "calibrated", "held-out"), rows)


def _without_empty(columns: tuple[str, ...], rows: Sequence[Row]) -> Table:
    kept = [i for i in range(len(columns)) if any(row.cells[i].text not in (NONE, "none") for row in rows)]
    shown = tuple(Row(row.label, tuple(row.cells[i] for i in kept)) for row in rows)
    return Table(tuple(columns[i] for i in kept), shown)


def grouped(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """By kind, in the order in which they come."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer)
    return found


def span(numbers: Sequence[int]) -> str:
    """64 or 64–379"""
    if not numbers:
        return NONE
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


# ---- in words ------------------------------------------------------------------------------------------------------


def done(run: Run) -> str:
    """What was done, as a sentence."""
    if run.stage == MEASURED:
        return "A measurement by evaluate, of a model that this record does not describe further."
    if run.stage == TRAINED:
        return _trained(run)
    if run.stage == EXPORTED:
        checked = run.comparison.get("tokens")
        proof = f"; what was written was loaded again and compared on {checked} tokens" if checked else ""
        return f"Exported from {run.config.get('source')} in the form {run.config.get('format')}{proof}."
    ranked = [layer for layer in run.layers if layer.rank is not None]
    backbones = dict.fromkeys(layer.backbone for layer in ranked)
    methods = " and ".join(dict.fromkeys(layer.method for layer in ranked))
    form = "W ≈ L R" if list(backbones) == ["none"] else f"W ≈ Q + L R with Q as {', '.join(backbones)}"
    ranks = span([layer.rank for layer in ranked if layer.rank is not None])
    return (
        f"{len(ranked)} of {len(run.layers)} linear layers of {run.base.get('name', 'the model')} became {form}, "
        f"method {methods}, rank {ranks}{_calibrated(run.calibration)}."
    )


def _trained(run: Run) -> str:
    data = run.config.get("dataset_name")
    steps = run.training.get("steps")
    length = f" for {steps} steps" if steps is not None else ""
    return (
        f"Trained {run.config.get('model_name_or_path')} on {data}{length}, mode {run.config.get('mode', 'factors')}, "
        f"objective {run.config.get('objective', 'sft')}."
    )


def _calibrated(calibration: Mapping[str, Any]) -> str:
    tokens, sources = calibration.get("tokens"), calibration.get("source")
    if not tokens:
        return ", without calibration text"
    return f", calibrated on {tokens:,} tokens of {option(sources)}"
