"""The table of what was measured: before and after, a column per run. A row that nobody has is no row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..console import duration, human_bytes
from ..evaluation.records import Value
from .numbers import NONE, THIN, change, decimals, fixed, share, significant
from .runs import MEASURED, Run
from .tables import Cell, Row, Table, mean

ORIGINAL = "original"
_BEFORE = ("dense", "original")  # what decomposition.json calls the model as it is, among the plans it ran

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
        start = before.measured.perplexity.get(text) if before and before.measured else _original(columns, text)
        seen = ["the run read this text" if _has_read(run, text) else "" for run in columns]
        rows += _row(f"perplexity, {name}", start, own, note=change, notes=seen, title=text)
    for text, name in short.items():
        divergence = [run.measured.kl.get(text) if run.measured else None for run in columns]
        rows += _row(f"KL to the original, {name} (nats per token)", None, divergence, title=text)
        same = [run.measured.agreement.get(text) if run.measured else None for run in columns]
        rows += _row(f"same likeliest token as the original, {name}", None, same, _percent, title=text)
    rows += _heldout(columns)
    tasks = dict.fromkeys(task for run in columns if run.measured for task in run.measured.scores)
    for task in tasks:
        scores = [run.measured.scores.get(task) if run.measured else None for run in columns]
        start = before.measured.scores.get(task) if before and before.measured else None
        ends = [_interval(score) for score in scores]
        rows += _row(task, start, scores, notes=ends)
    checks = [_value(run.comparison.get("kl")) for run in columns]
    rows += _row("KL to its source, as the export was checked", None, checks, show=lambda v: significant(v.value, 2))
    return rows


def _original(columns: Sequence[Run], text: str) -> Value | None:
    """What the records that compare with the original say of it; None where they do not agree."""
    found = [run.measured.original[text] for run in columns if run.measured and text in run.measured.original]
    return found[0] if found and all(abs(f.value - found[0].value) < 1e-3 * found[0].value for f in found) else None


def _percent(value: Value) -> str:
    error = "" if value.error is None else f" ± {100 * value.error:.1f}"
    return f"{100 * value.value:.1f}{error}{THIN}%"


def _interval(value: Value | None) -> str:
    return (
        "" if value is None or value.interval is None else f"95{THIN}%: {value.interval[0]:.3f}–{value.interval[1]:.3f}"
    )


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
