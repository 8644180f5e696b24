"""loss_curve.png beside an adapter: what the run's log says, drawn at every save and at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

Log = list[dict[str, Any]]  # trainer_state.json's log_history

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
# key in the log -> label, colour, drawn how; eval_* with markers, since they are few
_LINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loss": ("training loss", "#1f6feb", {"linewidth": 1.6}),
    "kl": ("KL to the teacher", "#2da44e", {"linewidth": 1.2}),
    "ce": ("cross-entropy", "#bf8700", {"linewidth": 1.2}),
    "eval_loss": ("evaluation loss", "#cf222e", {"linewidth": 1.2, "marker": "o", "markersize": 4}),
    "eval_kl": (
        "KL to the teacher, evaluation",
        "#2da44e",
        {"linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 4},
    ),
}


def points(log: Log, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, in order of steps; a step logged twice (by a resumed run) counts once, the last."""
    found = {entry["step"]: entry[key] for entry in log if key in entry}
    return sorted(found), [found[step] for step in sorted(found)]


def draw(log: Log, file: Path, title: str, unit: str) -> bool:
    """Write the picture (whole, under a temporary name first); False if the log has no loss yet."""
    if not points(log, "loss")[0]:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps, losses = points(log, "loss")
    shown = [key for key in _LINES if points(log, key)[0]]
    if points(log, "kl")[1] == losses:  # ce_weight 0, temperature 1: one line under another
        shown.remove("kl")
    for key in shown:
        label, colour, style = _LINES[key]
        x, y = points(log, key)
        raw = len(x) > 60 and "marker" not in style
        if raw:  # many noisy points: the raw line faint, its running mean over a twentieth of the run in front
            upper.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            y = _running_mean(y, max(3, len(y) // 20))
            label += " (running mean)"
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) < 20 else {}
        upper.plot(x, y, color=colour, label=label, **(dots | style))
    upper.set_ylabel(unit)
    if len(shown) > 1 or len(steps) > 60:
        upper.legend(frameon=False, fontsize=9, labelcolor=_INK)
    x, y = points(log, "learning_rate")
    lower.plot(x, y, color=_MUTED, linewidth=1.2, **({"marker": "o", "markersize": 2.5} if len(x) < 20 else {}))
    lower.set_ylabel("learning\nrate", fontsize=9)
    lower.set_xlabel("optimizer step")
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(2))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.yaxis.get_offset_text().set_fontsize(8)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
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


def _running_mean(values: list[float], width: int) -> list[float]:
    """Means over windows centred on each point, shorter at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
