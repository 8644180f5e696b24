"""loss_curve.png beside an adapter: what the run's log says, drawn at every save and at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = list[dict[str, float]]  # trainer_state.json's log_history

_FEW = 60  # points that are shown as they are
_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_LOSS, _KL, _CE, _HELD = "#1f6feb", "#2da44e", "#bf8700", "#cf222e"
_EVALUATED = {"linestyle": "--", "linewidth": 1.0, "marker": "o", "markersize": 4}
Lines = dict[str, tuple[str, str, dict[str, Any]]]  # key in the log -> label, colour, how it is drawn
_PLAIN: Lines = {
    "loss": ("training loss", _LOSS, {"linewidth": 1.6}),
    "eval_loss": ("evaluation loss", _HELD, _EVALUATED),
}
# of distillation: the cross-entropy is many times the KL, so it has axes of its own
_DISTILLED: Lines = {
    "loss": ("training loss", _LOSS, {"linewidth": 1.6}),
    "kl": ("KL to the teacher", _KL, {"linewidth": 1.2}),
    "eval_kl": ("KL to the teacher, evaluation", _KL, _EVALUATED),
}
_CROSS_ENTROPY: Lines = {
    "ce": ("training", _CE, {"linewidth": 1.2}),
    "eval_loss": ("evaluation", _CE, _EVALUATED),
}


def points(log: Log, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, in order of steps; a step logged twice (by a resumed run) counts once, the last."""
    found = {int(entry["step"]): entry[key] for entry in log if key in entry}
    return sorted(found), [found[step] for step in sorted(found)]


def draw(log: Log, file: Path, title: str, unit: str) -> bool:
    """Write the picture (whole, under a temporary name first); False if the log has no loss yet."""
    if not points(log, "loss")[0]:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    distilled = bool(points(log, "ce")[0])
    figure = Figure(figsize=(8, 6.4 if distilled else 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3, 2, 1] if distilled else [4, 1]
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    steps, _ = points(log, "loss")
    _plot(upper, log, _DISTILLED if distilled else _PLAIN)
    upper.set_ylabel(unit)
    if distilled:
        _plot(middle[0], log, _CROSS_ENTROPY)
        middle[0].set_ylabel("cross-entropy\n(nats per token)")
    x, y = points(log, "learning_rate")
    lower.plot(x, y, color=_MUTED, linewidth=1.2, **({"marker": "o", "markersize": 2.5} if len(x) < 20 else {}))
    lower.set_ylabel("learning\nrate", fontsize=9)
    lower.set_xlabel("optimizer step")
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.yaxis.get_offset_text().set_fontsize(8)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) <= 8:
        lower.set_xticks(steps)
    if len(steps) == 1:
        lower.set_xlim(steps[0] - 1, steps[0] + 1)
    for axes in (upper, *middle, lower):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_MUTED)
        axes.tick_params(colors=_INK, labelsize=9)
    figure.suptitle(title, fontsize=11, color=_INK)
    temporary = file.with_name(f".{file.name}.partial")
    figure.savefig(temporary, format="png")
    os.replace(temporary, file)
    return True


def _plot(axes: Axes, log: Log, lines: Lines) -> None:
    kl, loss = points(log, "kl")[1], points(log, "loss")[1]
    same = len(kl) == len(loss) and all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(kl, loss, strict=True))
    for key, (label, colour, style) in lines.items():
        x, y = points(log, key)
        if not x or (key == "kl" and same):
            continue  # with distill_ce_weight 0 and temperature 1 the loss is the KL
        if len(x) > _FEW and "marker" not in style:  # noisy: faint, with its running mean in front
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            y, label = running_mean(y, max(3, len(y) // 20)), label + " (running mean)"
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) < 20 else {}
        axes.plot(x, y, color=colour, label=label, **(dots | style))
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def running_mean(values: list[float], width: int) -> list[float]:
    """Means over windows centred on each point, shorter at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
