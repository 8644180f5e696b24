"""The Tucker design space (Moar et al., arXiv 2405.06626): which blocks, which tensors, which rank, about 9 % smaller.

    python scripts/study_tucker.py OUT --wikitext VALID.txt [--minilm DIR] [--tokens 8192] [--only TEXT]

Every point is a plan file that `decompose --plan` carries out twice: by `tucker`, without text, and by `whitened` at
the same layers and ranks, calibrated. Blocks are decomposed in the order of a placement until the checkpoint has lost
9 % of the bytes of its linear layers: spread (`--allocation spread`), adjacent (neighbours in the middle), first, last.
Of SmolLM2 (`demo`) held-out code and WikiText are measured, of MiniLM the cosine of 200 sentences' embeddings to those
of the dense model. Written: OUT/study_tucker.{md,json,png}. Finished rows are kept and not measured again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_engine import embeddings, prose
from bench_spine import Bench as SpineBench

import lord_tune
from lord_tune.adapters.loading import load
from lord_tune.allocation import factor_cost, role_of
from lord_tune.console import say
from lord_tune.integrations.models import quiet
from lord_tune.plans import Plan
from lord_tune.storage import read_json, write_json

REMOVED = 0.09  # of the linear layers' numbers
ATTENTION = ("qk", "v", "qkv", "o")
METHODS = {"tucker": {}, "whitened": {"sink_weight": 0.05}}


@dataclass(frozen=True)
class Point:
    placement: str
    tensors: str
    rank: int

    def __str__(self) -> str:
        return f"{self.placement}, {self.tensors}, rank {self.rank}"


POINTS = [
    *(Point(placement, "all", 1) for placement in ("spread", "adjacent", "first", "last")),
    *(Point("spread", tensors, 1) for tensors in ("attention", "mlp")),
    *(Point("spread", "all", rank) for rank in (64, 128)),
]


class Study:
    """Rows measured once and kept."""

    def __init__(self, folder: Path, only: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file, self.only = folder, folder / "study_tucker.json", only
        self.rows: dict[str, Any] = read_json(self.file) if self.file.exists() else {}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.rows and self.only in name:
            say(f"--- {name}")
            self.rows[name] = measure()
            write_json(self.file, self.rows)
        return self.rows.get(name)


def is_of(tensors: str, name: str, shape: tuple[int, int]) -> bool:
    """Whether a layer is one of these tensors. BERT calls both outputs 'output.dense': the parent tells them apart."""
    attends = "attention" in name.split(".") or role_of(name, shape) in ATTENTION
    return tensors == "all" or attends == (tensors == "attention")


def plan_of(study: Study, model: str, point: Point) -> Path:
    """The plan file of a point, by the allocation `spread` or from its plan with other blocks."""
    path = study.folder / "plan.json"
    options: dict[str, Any] = {"method": "tucker", "form": "plain", "json": str(study.folder / "estimate.json")}
    lord_tune.plan(model, save=str(path), rank=1, **options)
    whole = Plan.read(path)
    shapes = {name: choice.shape for name, choice in whole.layers.items()}
    if any(shape is None for shape in shapes.values()):
        loaded, _ = load(model)
        shapes = {name: tuple(loaded.get_submodule(name).weight.shape) for name in shapes}
    to_save = REMOVED * sum(math.prod(shape) for shape in shapes.values())
    chosen = [name for name in shapes if is_of(point.tensors, name, shapes[name])]
    saves = {name: math.prod(shapes[name]) - factor_cost(shapes[name], point.rank) for name in chosen}
    if point.placement == "spread":
        target = "|".join(name.replace(".", r"\.") + "$" for name in chosen)
        kept = 1 - to_save / sum(math.prod(shapes[name]) for name in chosen)
        lord_tune.plan(
            model, save=str(path), targets=target, kept_fraction=kept, allocation="spread", rank=point.rank, **options
        )
        ranks = Plan.read(path).ranks()
        decomposed = {name for name, rank in ranks.items() if rank is not None}
    else:
        decomposed = set()
        for name in in_order(chosen, point.placement):
            if sum(saves[name] for name in decomposed) >= to_save:
                break
            decomposed.add(name)
    layers = {name: c.at(point.rank if name in decomposed else None) for name, c in whole.layers.items()}
    Plan(layers).save(path)
    return path


def in_order(names: list[str], placement: str) -> list[str]:
    """The layers by their blocks in the order of the placement."""
    blocks = {name: next(int(part) for part in name.split(".") if part.isdigit()) for name in names}
    middle = statistics.median(blocks.values())
    keys: dict[str, Callable[[str], float]] = {
        "first": lambda name: blocks[name],
        "last": lambda name: -blocks[name],
        "adjacent": lambda name: abs(blocks[name] - middle + 0.1),
    }
    return sorted(names, key=keys[placement])


def decomposed(study: Study, model: str, point: Point, method: str, text: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's folder, bytes, decomposed blocks and the run's peak memory."""
    path = plan_of(study, model, point)
    plan = Plan.read(path)
    own = {name: replace(c, method=method, method_options=METHODS[method]) for name, c in plan.layers.items()}
    Plan(own).save(path)
    out = study.folder / "model"
    start = time.perf_counter()
    report = lord_tune.decompose(
        model, str(out), plan=str(path), overwrite=True, **(text if method == "whitened" else {})
    )
    ranked = [name for name, rank in plan.ranks().items() if rank is not None]
    blocks = sorted({next(int(part) for part in name.split(".") if part.isdigit()) for name in ranked})
    totals = report["totals"]
    return {
        "blocks": blocks,
        "layers": len(ranked),
        "seconds": time.perf_counter() - start,
        "bytes": totals["model_bytes"],
        "removed": 1 - totals["kept_fraction"],
        "peak": totals["peak_memory_bytes"],
        "folder": str(out),
    }


def causal(study: Study, wikitext: str, tokens: int) -> list[tuple[str, str, dict[str, Any]]]:
    """SmolLM2: held-out losses, latency and peak memory of an evaluation."""
    spine = SpineBench(study.folder)
    texts = {"code": str(spine.held), "wikitext": wikitext}

    def measure(folder: str) -> dict[str, Any]:
        found = lord_tune.evaluate(folder, text=list(texts.values()), max_tokens=tokens, context_length=512)
        losses = {key: found["texts"][text]["loss"] for key, text in texts.items()}
        return losses | {"ms": 1000 / found["tokens_per_second"], "evaluation_peak": found["peak_rss_bytes"]}

    text = {"calibration": [str(spine.code)], "calibration_tokens": tokens, "context_length": 512}
    return measured(study, "SmolLM2", spine.dense, text, measure)


def encoder(study: Study, model: str, tokens: int) -> list[tuple[str, str, dict[str, Any]]]:
    """MiniLM: cosines of embeddings to the dense ones, and the seconds of embedding."""
    calibration, sentences = prose(study)  # type: ignore[arg-type]
    before = embeddings(model, sentences)

    def measure(folder: str) -> dict[str, Any]:
        start = time.perf_counter()
        after = embeddings(folder, sentences)
        seconds = time.perf_counter() - start
        cosine = torch.nn.functional.cosine_similarity(before, after)
        return {"mean": float(cosine.mean()), "worst": float(cosine.min()), "ms": 1000 * seconds / len(sentences)}

    text = {"calibration": [str(calibration)], "calibration_tokens": tokens, "context_length": 128}
    return measured(study, "MiniLM", model, text, measure)


def measured(
    study: Study, label: str, model: str, text: dict[str, Any], measure: Callable[[str], dict[str, Any]]
) -> list[tuple[str, str, dict[str, Any]]]:
    """(point, method, row) of every point that has been measured; the dense model first."""
    found = [("dense", "", study.once(f"{label}: dense", lambda: measure(model)))]
    for point in POINTS:
        for method in METHODS:

            def row(point: Point = point, method: str = method) -> dict[str, Any]:
                made = decomposed(study, model, point, method, text)
                return made | measure(made["folder"])

            found.append((str(point), method, study.once(f"{label}: {point}, {method}", row)))
    return [entry for entry in found if entry[2] is not None]


HEADS = {
    "SmolLM2": ("code perplexity", "WikiText perplexity", "ms/token", "peak, evaluation"),
    "MiniLM": ("mean cosine", "worst cosine", "ms/sentence"),
}


def cells(label: str, row: dict[str, Any]) -> list[str]:
    if label == "MiniLM":
        return [f"{row['mean']:.4f}", f"{row['worst']:.4f}", f"{row['ms']:.1f}"]
    perplexities = [f"{math.exp(row[text]):.5g}" for text in ("code", "wikitext")]
    return [*perplexities, f"{row['ms']:.0f}", f"{row['evaluation_peak'] / 1e6:.0f} MB"]


def table(label: str, rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    heads = [f"{label}: point", "method", "blocks", "checkpoint", "peak, decomposition", *HEADS[label]]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for point, method, row in rows:
        made = ["", "", ""]
        if method:
            made = [",".join(map(str, row["blocks"])), f"{row['bytes'] / 1e6:.1f} MB", f"{row['peak'] / 1e6:.0f} MB"]
        lines.append(f"| {' | '.join([point, method, *made, *cells(label, row)])} |")
    return "\n".join(lines)


def draw(file: Path, found: dict[str, list[tuple[str, str, dict[str, Any]]]]) -> None:
    """What each point costs, by method: the perplexity over dense (log), and one minus the cosine (log)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(found), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        dense = next((row for _, method, row in rows if not method), None)
        cost = (lambda row: 1 - row["mean"]) if label == "MiniLM" else (lambda row: math.exp(row["code"]))
        points = list(dict.fromkeys(point for point, method, _ in rows if method))
        for method, colour, marker in (("tucker", "#cf222e", "o"), ("whitened", "#1f6feb", "s")):
            own = [(points.index(point), cost(row)) for point, used, row in rows if used == method]
            if own:
                axes.plot(*zip(*own, strict=True), marker, color=colour, label=method)
        if dense is not None and label != "MiniLM":
            axes.axhline(cost(dense), color="#1f2933", linestyle=":", linewidth=0.8, label="dense")
        axes.set_yscale("log")
        axes.set_xticks(range(len(points)), points, rotation=35, ha="right", fontsize=8)
        axes.set_title(f"{label}, 9 % of the linears removed", fontsize=10)
        axes.set_ylabel("1 - mean cosine to dense" if label == "MiniLM" else "perplexity, held-out code")
        axes.grid(axis="y", color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--minilm", help="folder of the model; left out without it")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, and of each held-out text")
    parser.add_argument("--only", default="", help="measure rows with this in their names; show all that are there")
    given = parser.parse_args()
    quiet()
    study = Study(given.out, given.only)
    found = {} if given.minilm is None else {"MiniLM": encoder(study, given.minilm, given.tokens)}
    found["SmolLM2"] = causal(study, given.wikitext, given.tokens)
    text = "\n\n".join(table(label, rows) for label, rows in found.items()) + "\n"
    (given.out / "study_tucker.md").write_text(text)
    draw(given.out / "study_tucker.png", found)
    print(text)


if __name__ == "__main__":
    main()
