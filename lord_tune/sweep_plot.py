"""Predicted loss against bytes: NAME.png and NAME.svg of `plan --sweep`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .planning import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_INK, _GRID = "#1f2933", "#e4e7eb"
_COLOURS = ("#1f6feb", "#2da44e", "#bf8700", "#cf222e", "#8250df", "#57606a", "#0a7ea4", "#a04040")


def draw(points: list[Point], dense_bytes: int, dense_loss: float | None, files: list[Path], title: str) -> None:
    """One panel of predictions and, where plans were measured, one of perplexity; each file whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = dense_loss is not None
    figure = Figure(figsize=(14 if measured else 8, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    _plot(panels[0], points, {p: p.predicted_loss for p in points})
    panels[0].set_ylabel("predicted increase of the loss (nats per token)")
    if measured:
        _plot(panels[1], points, {p: math.exp(min(p.loss, 80.0)) for p in points if p.loss is not None})
        _plain_numbers(panels[1].yaxis)
        panels[1].set_ylabel("perplexity on the held-out text")
        panels[1].axhline(math.exp(dense_loss or 0.0), color=_INK, linewidth=0.8, linestyle=":")
        panels[1].annotate(
            "the model as it is", (0.99, math.exp(dense_loss or 0.0)), (0, 3), ("axes fraction", "data"),
            "offset points", ha="right", fontsize=8, color=_INK,
        )  # fmt: skip
    for axes in panels:
        axes.set_xlabel(f"bytes of the checkpoint (MB; the model as it is: {dense_bytes / 1e6:.1f})")
        axes.grid(color=_GRID, linewidth=0.8, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=_INK)
    figure.suptitle(title, fontsize=11, color=_INK)
    for file in files:
        temporary = file.with_name(f".{file.name}.partial")
        figure.savefig(temporary, format=file.suffix.removeprefix("."))
        os.replace(temporary, file)


def _plain_numbers(axis: Axis) -> None:
    """200 and not 2 x 10^2, on an axis that spans less than a power of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_formatter(lambda value, place: "")


def _plot(axes: Axes, points: list[Point], values: dict[Point, float]) -> None:
    """A line per series; single formats, which are no series of sizes, as labelled dots."""
    by_series: dict[str, list[Point]] = {}
    for point in values:
        by_series.setdefault(point.series, []).append(point)
    for number, (series, own) in enumerate(by_series.items()):
        own = sorted(own, key=lambda point: point.bytes)
        x, y = [point.bytes / 1e6 for point in own], [max(values[point], 1e-6) for point in own]
        alone = series.startswith("one format")
        style = {"linestyle": "none", "marker": "x"} if alone else {"marker": "o", "markersize": 4, "linewidth": 1.5}
        axes.plot(x, y, color=_COLOURS[number % len(_COLOURS)], label=series, **style)  # type: ignore[arg-type]
        if alone:
            for point, left, up in zip(own, x, y, strict=True):
                axes.annotate(point.setting, (left, up), (4, 3), textcoords="offset points", fontsize=7, color=_INK)
    axes.set_yscale("log")
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
