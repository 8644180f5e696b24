"""The tables of a report: runs are columns, what is known of them rows. A row that nobody has is no row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RECORDS
from ..console import human_bytes
from .numbers import NONE, option, places, share
from .parts import PARTS
from .runs import EXPORTED, MEASURED, TRAINED, Layer, Run
from .trained import OF_THE_RUN

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


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
            places(mean(layer.bits for layer in own), 2),
            places(mean(layer.calibrated for layer in own), 4),
            places(mean(layer.heldout for layer in own), 4),
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
            places(layer.bits, 2),
            places(layer.calibrated, 4),
            places(layer.heldout, 4),
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
        model = run.base.get("name")
        return f"A measurement of {model} by evaluate." if model else "A measurement by evaluate, which names no model."
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
