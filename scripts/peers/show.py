"""The rows as a table for every size class, and as a plot of perplexity against bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lord_tune.console import show_table

from .experiments import CLASSES, DENSE, EXPERIMENTS, LOW_RANK, REFUSED

TEXTS = ("code", "wikitext")


def tables(model: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Of every size class: sizes, errors and perplexities, then memory and time."""
    quality = ["row", "MB", "bits/weight", "error: weights", "outputs", "held out"]
    quality += [f"{text}: {when}" for text in TEXTS for when in ("start", "trained", "merged")] + ["rate"]
    costs = ["row", "what", "peak GB: made", "trained", "seconds: made", "a run", "merged"]
    for size, title in CLASSES.items():
        found = {name: rows[name] for name, entry in EXPERIMENTS.items() if entry.size == size and name in rows}
        refused = {name: (what, why) for name, (of, what, why) in REFUSED.items() if of == size}
        if not found:
            continue
        lines = [[name, *qualities(row)] for name, row in found.items() if "made" in row]
        show_table(f"{model}: {title}", quality, lines)
        lines = [[name, _told(row), *spent(row)] for name, row in found.items()]
        lines += [[name, f"{what}: {why}", *[""] * (len(costs) - 2)] for name, (what, why) in refused.items()]
        show_table(f"{model}: {title}: memory and time", costs, lines)


def _told(row: Mapping[str, Any]) -> str:
    """What a row is, and why it was not measured."""
    return row["experiment"]["what"] + (f": {row['why']}" if "why" in row else "")


def qualities(row: Mapping[str, Any]) -> list[str]:
    made, wrong = row["made"], row["errors"]
    cells = [f"{made['bytes'] / 1e6:.1f}", f"{made['bits_per_weight']:.2f}"]
    cells += [f"{wrong[key]:.4f}" if wrong else "" for key in ("weight", "calibrated", "heldout")]
    for text in TEXTS:
        cells += [f"{row[when][text]:.3f}" if when in row else "" for when in ("start", "end", "merged")]
    return [*cells, f"{row['rate']:g}" if "rate" in row else ""]


def spent(row: Mapping[str, Any]) -> list[str]:
    """Peak memory in GB, made and trained; seconds to make, of a training run (mean over the rates), to merge."""
    if "made" not in row:
        return [""] * 5
    runs = [entry["seconds"] for entry in row.get("rates", {}).values()]
    return [
        f"{row['made']['peak_bytes'] / 1e9:.2f}",
        f"{row['train_peak_bytes'] / 1e9:.2f}" if "train_peak_bytes" in row else "",
        f"{row['made']['seconds']:.0f}",
        f"{sum(runs) / len(runs):.0f}" if runs else "",
        f"{row['merge']['seconds']:.0f}" if "merge" in row else "",
    ]


_COLOURS = {"lord_tune": "#c0392b", "others": "#2c5d8f"}


def plot(model: str, rows: Mapping[str, dict[str, Any]], target: Path) -> None:
    """Perplexity against bytes on each text: hollow at the start, filled after training, joined; the dotted line is the
    best of what is as small."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    shown = [
        name for name, row in rows.items() if "start" in row and row["experiment"]["size"] not in (DENSE, LOW_RANK)
    ]
    shown.sort(key=lambda name: rows[name]["made"]["bytes"])
    if not shown:
        return
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, text in zip(figure.subplots(1, 2), TEXTS, strict=True):
        points = []
        for number, name in enumerate(shown):
            row = rows[name]
            size, before, after = row["made"]["bytes"] / 1e6, row["start"][text], row.get("end", row["start"])[text]
            points.append((size, after))
            colour = _COLOURS["lord_tune" if name.startswith("ours") else "others"]
            axes.plot(size, before, "o", mfc="none", color=colour)
            if "end" in row:
                axes.plot([size, size], [before, after], "-", color=colour, lw=0.8)
                axes.plot(size, after, "o", color=colour)
            aside = (6 if number % 2 else -14, 6 if number % 4 < 2 else -10)  # equal bytes give equal places
            axes.annotate(str(number + 1), (size, after), xytext=aside, textcoords="offset points", fontsize=8)
        axes.step(*zip(*pareto(points), strict=True), where="post", color="grey", lw=0.8, ls=":")
        if "original" in rows:
            axes.axhline(rows["original"]["start"][text], color="grey", lw=0.8)
        axes.set(title=f"{model}, {text}", xlabel="MB of the kept files", ylabel="perplexity", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(ScalarFormatter())
        axes.grid(alpha=0.3, which="both")
    told = _wrapped("   ".join(f"{number + 1} {name}" for number, name in enumerate(shown)))
    told += "\nhollow: start, filled: trained; red: lord_tune, blue: others; grey line: the original"
    figure.supxlabel(told, fontsize=8)
    figure.savefig(target, dpi=110)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for size, value in sorted(points):
        if not best or value < best[-1][1]:
            best.append((size, value))
    return best


def _wrapped(text: str, width: int = 190) -> str:
    lines = [""]
    for word in text.split("   "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "") + word
    return "\n".join(lines)
