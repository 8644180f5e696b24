"""The rows as a table for every size class, and as a plot of perplexity against bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lord_tune.console import show_table

from .experiments import CLASSES, DENSE, EXPERIMENTS, LOW_RANK, REFUSED

TEXTS = ("code", "wikitext")


def tables(model: str, rows: Mapping[str, dict[str, Any]]) -> None:
    columns = ["row", "MB", "bits/weight", "weight", "outputs", "held out"]
    columns += [f"{text}: {when}" for text in TEXTS for when in ("start", "trained", "merged")]
    columns += ["rate", "peak GB: made, trained", "seconds: made, a run, merged"]
    for size, title in CLASSES.items():
        lines = [line(rows[name]) for name, entry in EXPERIMENTS.items() if entry.size == size and name in rows]
        lines += [[what, why] + [""] * (len(columns) - 2) for of, what, why in REFUSED.values() if of == size]
        if lines:
            show_table(f"{model}: {title}", columns, lines)


def line(row: Mapping[str, Any]) -> list[str]:
    what = row["experiment"]["what"]
    if "start" not in row:
        return [what, row.get("why", "stopped"), *[""] * 12]
    made, wrong = row["made"], row["errors"]
    cells = [what, f"{made['bytes'] / 1e6:.1f}", f"{made['bits_per_weight']:.2f}"]
    cells += [f"{wrong[key]:.4f}" if wrong else "" for key in ("weight", "calibrated", "heldout")]
    for text in TEXTS:
        cells += [f"{row[when][text]:.3f}" if when in row else "" for when in ("start", "end", "merged")]
    cells.append(f"{row['rate']:g}" if "rate" in row else "")
    peaks = [made["peak_bytes"], *([row["train_peak_bytes"]] if "train_peak_bytes" in row else [])]
    cells.append(", ".join(f"{value / 1e9:.2f}" for value in peaks))
    runs = [entry["seconds"] for entry in row.get("rates", {}).values()]
    spent = [made["seconds"], *([sum(runs) / len(runs)] if runs else [])]
    spent += [row["merge"]["seconds"]] if "merge" in row else []
    return [*cells, ", ".join(f"{value:.0f}" for value in spent)]


_COLOURS = {"lord_tune": "#c0392b", "others": "#2c5d8f"}


def plot(model: str, rows: Mapping[str, dict[str, Any]], target: Path) -> None:
    """Perplexity against bytes on each text: hollow at the start, filled after training, joined; the line is the best
    of what is as small."""
    from matplotlib.figure import Figure

    shown = {
        name: row for name, row in rows.items() if "start" in row and row["experiment"]["size"] not in (DENSE, LOW_RANK)
    }
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, text in zip(figure.subplots(1, 2), TEXTS, strict=True):
        for number, (_, row) in enumerate(sorted(shown.items(), key=lambda item: item[1]["made"]["bytes"])):
            size, before = row["made"]["bytes"] / 1e6, row["start"][text]
            colour = _COLOURS["lord_tune" if row["experiment"]["what"].startswith("lord_tune") else "others"]
            axes.plot(size, before, "o", mfc="none", color=colour)
            after = row["end"][text] if "end" in row else before
            if "end" in row:
                axes.plot([size, size], [before, after], "-", color=colour, lw=0.8)
                axes.plot(size, after, "o", color=colour)
            axes.annotate(str(number + 1), (size, after), xytext=(4, -9), textcoords="offset points", fontsize=8)
        best = pareto([(row["made"]["bytes"] / 1e6, row.get("end", row["start"])[text]) for row in shown.values()])
        axes.step(*zip(*best, strict=True), where="post", color="grey", lw=0.8, ls=":")
        if "original" in rows:
            axes.axhline(rows["original"]["start"][text], color="grey", lw=0.8)
        axes.set(title=f"{model}, {text}", xlabel="MB of the kept files", ylabel="perplexity", yscale="log")
        axes.grid(alpha=0.3, which="both")
    names = [row["experiment"]["what"] for row in sorted(shown.values(), key=lambda row: row["made"]["bytes"])]
    told = "   ".join(f"{number + 1} {name}" for number, name in enumerate(names))
    figure.supxlabel(
        _wrapped(told + "\nhollow: start; filled: trained; red: lord_tune; grey line: the original"), fontsize=8
    )
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
