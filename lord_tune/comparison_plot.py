"""Perplexity of the rows of `compare`: one panel per text, a line per row, each file whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

_INK, _GRID, _START, _END = "#1f2933", "#e4e7eb", "#1f6feb", "#bf8700"


def draw(report: dict[str, Any], texts: list[str], files: list[Path], title: str) -> None:
    """Dots of the decomposed models and, where they were trained, of the trained ones; the model as it is as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {word: row for word, row in report["rows"].items() if "start" in row}
    height = 1.6 + 0.38 * len(rows)
    figure = Figure(figsize=(3.2 + 4.4 * len(texts), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    places = list(range(len(rows)))[::-1]
    for number, (axes, text) in enumerate(zip(panels, texts, strict=True)):
        dense = math.exp(min(report["dense"]["start"]["losses"][number], 80.0))
        found = {
            which: [
                math.exp(min(row[which]["losses"][number], 80.0)) if which in row else None for row in rows.values()
            ]
            for which in ("start", "end")
        }
        for place, before, after in zip(places, found["start"], found["end"], strict=True):
            if after is not None:
                axes.plot([before, after], [place, place], color=_GRID, linewidth=2, zorder=1)
                axes.plot(after, place, "o", color=_END, markersize=6, label="after training")
            axes.plot(before, place, "o", color=_START, markersize=6, label="decomposed")
        axes.axvline(dense, color=_INK, linewidth=0.9, linestyle=":", label="the model as it is")
        axes.set_xscale("log")
        values = [value for own in found.values() for value in own if value is not None] + [dense]
        _ticks(axes, min(values), max(values))
        axes.set_xlabel(f"perplexity, {text}", color=_INK)
        axes.set_yticks(places, list(rows))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(), once.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK
    )
    figure.suptitle(title, fontsize=11, color=_INK)
    for file in files:
        temporary = file.with_name(f".{file.name}.partial")
        figure.savefig(temporary, format=file.suffix.removeprefix("."))
        os.replace(temporary, file)


def _ticks(axes: Any, least: float, most: float) -> None:
    """About five round numbers over the range that the values span."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    span = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(least, most)
    if most > 8 * least:
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        span = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([value for value in span if 0.85 * least <= value <= 1.15 * most]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_xlim(0.92 * least, 1.08 * most)
