"""The figures of a report, as <svg> elements: one small drawing each, so that a narrow page can put them below each
other. What there are no numbers for is no figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..training.curve import points, running_mean
from .numbers import significant
from .runs import Layer, Run
from .tables import grouped, span
from .themed_svg import FILL, GRID, INK, MUTED, SERIES, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_PANEL = (356.0, 216.0)
_BLOCKS = 8  # whose curves are drawn in one panel
_FEW = 40  # points of a curve that are marked one by one
_NOISY = 80  # points from which a running mean is drawn in front
_CELL = (15.0, 21.0)  # of a map


@dataclass(frozen=True)
class Figure:
    svg: str
    caption: str
    note: str = ""  # below it, small
    wide: bool = False  # keeps its size, in a box that scrolls


def _ticks(axis: Axis, integers: bool = False, count: int = 5) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, integer=integers, min_n_ticks=2))
    if not integers:
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, axis.get_view_interval()[1])))


def _tick(value: float, largest: float) -> str:
    """Plain digits; of an axis of very small numbers, all by powers of ten."""
    if not value or abs(largest) >= 1e-2:
        return f"{value:g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


# ---- spectra -------------------------------------------------------------------------------------------------------


def spectra(run: Run, key: str, colour: int) -> list[Figure]:
    """A panel per kind of layer: the error at every rank, and the rank that was chosen."""
    found = []
    for number, (kind, layers) in enumerate(grouped(run.layers).items()):
        own = [layer for layer in layers if layer.spectrum and len(layer.spectrum["ranks"]) > 1]
        if not own:
            continue
        shown = _evenly(own, _BLOCKS)
        named = [layer.block for layer in shown if layer.block is not None]
        blocks = (
            f"{len(shown)} of {len(own)} layers"
            if len(shown) < len(own)
            else "1 layer"
            if len(own) == 1
            else f"{len(own)} layers"
        )
        blocks += f", blocks {min(named)}–{max(named)}" if len(set(named)) > 1 else ""
        chosen = [layer.rank for layer in own if layer.rank is not None]
        text = f"{kind}: relative error at each rank, for {blocks}; chosen rank {span(chosen)}"
        svg = themed(
            f"{key}-{number}", _PANEL, f"Spectrum of {kind}", text, partial(_spectrum, layers=shown, colour=colour)
        )
        found.append(Figure(svg, kind, f"{blocks}; rank {span(chosen)}"))
    return found


def _evenly(layers: Sequence[Layer], count: int) -> list[Layer]:
    if len(layers) <= count:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def _spectrum(axes: Axes, layers: Sequence[Layer], colour: int) -> None:
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    widest = 1
    for place, layer in enumerate(layers):
        assert layer.spectrum is not None
        ranks, errors = layer.spectrum["ranks"], layer.spectrum["errors"]
        depth = 0.3 + 0.7 * place / max(1, len(layers) - 1)  # the later the block, the stronger its line
        axes.plot(ranks, errors, color=SERIES[colour], alpha=depth, linewidth=1.2)
        widest = max(widest, ranks[-1])
        if layer.rank is not None:
            at = float(np.interp(layer.rank, ranks, errors))
            axes.plot([layer.rank], [at], color=SERIES[colour], marker="o", markersize=4.5, linestyle="none")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    steps = [0, *(4**power for power in range(8) if 4**power <= widest)]
    if widest / steps[-1] >= 1.8:
        steps.append(widest)
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, widest)
    axes.set_ylim(bottom=0)
    _ticks(axes.yaxis)
    axes.set_xlabel("rank")
    axes.set_ylabel("relative error")


# ---- errors over depth ---------------------------------------------------------------------------------------------


def errors(runs: Sequence[Run], colours: Mapping[str, int]) -> list[Figure]:
    """A panel per kind of layer: errors over the blocks, calibrated (line) and held-out (dashes), all runs together."""
    kinds = dict.fromkeys(kind for run in runs for kind in grouped(run.layers))
    found = []
    for number, kind in enumerate(kinds):
        lines = [(run, _over_blocks(grouped(run.layers).get(kind, []))) for run in runs]
        lines = [(run, values) for run, values in lines if values]
        if not any(len(values) > 1 for _, values in lines):
            continue
        heldout = any(value[1] is not None for _, values in lines for value in values.values())
        text = f"{kind}: relative error of the layer's outputs over the blocks, on the calibration text" + (
            " and on held-out text" if heldout else ""
        )
        svg = themed(
            f"errors-{number}",
            _PANEL,
            f"Errors of {kind}",
            text,
            partial(_errors, lines=[(colours[run.label], values) for run, values in lines]),
        )
        found.append(Figure(svg, kind))
    return found


def _over_blocks(layers: Sequence[Layer]) -> dict[int, tuple[float | None, float | None]]:
    """block -> mean calibrated and held-out error of its decomposed layers of one kind."""
    by_block: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.block is not None and layer.rank is not None and layer.calibrated is not None:
            by_block.setdefault(layer.block, []).append(layer)

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        block: (mean([layer.calibrated for layer in own]), mean([layer.heldout for layer in own]))
        for block, own in sorted(by_block.items())
    }


def _errors(axes: Axes, lines: Sequence[tuple[int, dict[int, tuple[float | None, float | None]]]]) -> None:
    for colour, values in lines:
        blocks = range(min(values), max(values) + 1)
        few: dict[str, Any] = {"marker": "o", "markersize": 2.6} if len(blocks) <= _FEW else {}
        # a block that was left dense is a gap
        calibrated, heldout = ([_or_gap(values.get(block, (None, None))[i]) for block in blocks] for i in (0, 1))
        axes.plot(blocks, calibrated, color=SERIES[colour], linewidth=1.3, **few)
        hollow = few | ({"markerfacecolor": "none", "markeredgewidth": 0.7} if few else {})
        axes.plot(blocks, heldout, color=SERIES[colour], linewidth=1.1, linestyle=(0, (3, 2)), **hollow)
    axes.set_ylim(bottom=0)
    _ticks(axes.yaxis)
    _ticks(axes.xaxis, integers=True, count=7)
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")


def _or_gap(value: float | None) -> float:
    return math.nan if value is None else value


# ---- maps ----------------------------------------------------------------------------------------------------------


def maps(run: Run, key: str) -> list[Figure]:
    """Ranks and bits: a row per kind of layer, a column per block. What is alike everywhere is no map."""
    found = []
    for name, what, of in (("rank", "Rank", lambda layer: layer.rank), ("bits", "Bits per weight", lambda x: x.bits)):
        cells = _cells(run.layers, of)
        known = [value for value in cells.values() if value is not None]
        if len(known) < 2 or min(known) == max(known):
            continue
        kinds = list(dict.fromkeys(kind for kind, _ in cells))
        blocks = sorted({block for _, block in cells})
        least, most = significant(min(known)), significant(max(known))
        if name == "rank":
            least, most = f"{min(known):.0f}", f"{max(known):.0f}"
        width = 7.0 * max(map(len, kinds)) + 30 + max(_CELL[0] * len(blocks), 150)
        size = (max(356.0, width), 52 + _CELL[1] * len(kinds))
        dense = any(value is None for value in cells.values())
        rest = "; empty cells: left dense" if dense and name == "rank" else ""
        note = f"from {least} (faint) to {most} (strong){rest}"
        caption = f"{what} over depth"
        svg = themed(
            f"{key}-{name}",
            size,
            f"{what} over depth of {run.label}",
            f"{caption}, {note}. Rows: {', '.join(kinds)}; columns: blocks {blocks[0]} to {blocks[-1]}.",
            partial(_map, cells=cells, kinds=kinds, blocks=blocks),
        )
        found.append(Figure(svg, caption, note, wide=True))
    return found


def _cells(layers: Sequence[Layer], of: Any) -> dict[tuple[str, int], float | None]:
    """(kind, block) -> the mean over the layers there; None where all are dense."""
    found: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        if layer.block is not None:
            own = found.setdefault((layer.kind, layer.block), [])
            if (value := of(layer)) is not None:
                own.append(value)
    return {place: sum(values) / len(values) if values else None for place, values in found.items()}


def _map(axes: Axes, cells: Mapping[tuple[str, int], float | None], kinds: list[str], blocks: list[int]) -> None:
    from matplotlib.patches import Rectangle

    known = [value for value in cells.values() if value is not None]
    least, extent = min(known), max(known) - min(known)
    for (kind, block), value in cells.items():
        place = (blocks.index(block) - 0.5, kinds.index(kind) - 0.5)
        if value is None:
            axes.add_patch(Rectangle(place, 1, 1, facecolor="none", edgecolor=GRID, linewidth=0.8))
        else:
            strength = 0.12 + 0.88 * (value - least) / extent
            axes.add_patch(Rectangle(place, 1, 1, facecolor=FILL, alpha=strength, edgecolor="none"))
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(False)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, -(-len(blocks) // 12))
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("block")


# ---- training ------------------------------------------------------------------------------------------------------

_CURVES = {
    "loss": "training loss",
    "eval_loss": "loss on evaluation text",
    "kl": "KL to the teacher",
    "eval_kl": "KL to the teacher, evaluation",
    "ce": "cross-entropy",
    "learning_rate": "learning rate",
}


def curves(runs: Sequence[Run], colours: Mapping[str, int]) -> list[Figure]:
    """A panel per quantity that the logs hold, all training runs together."""
    found = []
    for key, what in _CURVES.items():
        lines = []
        for run in runs:
            history = run.training.get("history")
            log = [e for e in history if isinstance(e, dict) and "step" in e] if isinstance(history, list) else []
            steps, values = points(log, key)
            if len(steps) > 1:
                lines.append((colours[run.label], steps, values))
        if not lines:
            continue
        last = max(steps[-1] for _, steps, _ in lines)
        svg = themed(
            f"training-{key.replace('_', '-')}",
            _PANEL,
            what,
            f"{what} over {last} optimizer steps",
            partial(_curves, lines=lines),
        )
        noisy = any(len(steps) > _NOISY for _, steps, _ in lines)
        found.append(Figure(svg, what, "faint: every logged step; strong: running mean" if noisy else ""))
    return found


def _curves(axes: Axes, lines: Sequence[tuple[int, list[int], list[float]]]) -> None:
    for colour, steps, values in lines:
        if len(steps) > _NOISY:
            axes.plot(steps, values, color=SERIES[colour], alpha=0.3, linewidth=0.8)
            values = running_mean(values, max(3, len(values) // 20))
        few: dict[str, Any] = {"marker": "o", "markersize": 2.6} if len(steps) <= _FEW else {}
        axes.plot(steps, values, color=SERIES[colour], linewidth=1.4, **few)
    _ticks(axes.yaxis)
    _ticks(axes.xaxis, integers=True, count=6)
    axes.set_xlabel("optimizer step")


# ---- parts ---------------------------------------------------------------------------------------------------------


def parts(runs: Sequence[Run], order: Sequence[str]) -> Figure | None:
    """A bar of bytes per run, in shades; the table beside it has the numbers."""
    own = [run for run in runs if run.parts]
    if not own:
        return None
    kinds = [part for part in order if any(part in run.parts for run in own)]
    size = (420.0, 34.0 + 26.0 * len(own))
    svg = themed(
        "parts", size, "Bytes by part", "The numbers are in the table.", partial(_parts, runs=own, kinds=kinds)
    )
    return Figure(svg, "Bytes by part", "in the order of the table, from left to right")


def _parts(axes: Axes, runs: Sequence[Run], kinds: Sequence[str]) -> None:
    for place, run in enumerate(runs):
        left = 0.0
        for index, part in enumerate(kinds):
            width = run.parts.get(part, 0) / 1e6
            strength = 1.0 - 0.8 * index / max(1, len(kinds) - 1)
            axes.barh(place, width, left=left, height=0.62, color=FILL, alpha=strength, edgecolor="none")
            axes.barh(place, width, left=left, height=0.62, facecolor="none", edgecolor=INK, linewidth=0.5)
            left += width
    axes.set_yticks(range(len(runs)), [_cut(run.label) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_color(MUTED)
    _ticks(axes.xaxis)
    axes.set_xlabel("MB")


def _cut(text: str, longest: int = 22) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
