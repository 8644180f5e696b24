"""Decoding speed of low-rank factors beside the dense model: python scripts/bench_speed.py OUT MODEL [MODEL ...]

Each MODEL (a folder, or demo) is decomposed to 80 % of its linears' parameters, in pivoted and in plain form, and
generates greedily at batch 1 with a cache, in turns with the dense model, on one thread in the same dtype. What counts
for the speed is the shapes, so the decomposition is the quickest one: `svd`, `uniform`, every layer factored. The table
has medians, the profile says where the time of a token goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import lord_tune
from lord_tune.console import show_table
from lord_tune.integrations.models import quiet
from lord_tune.integrations.sources import resolve_model

PROMPT, GENERATED = 16, 24
KEPT = 0.8
PIECES = {"linear layers": ("mm", "addmm", "mv", "addmv", "addmv_"), "pivoting": ("cat", "index_select")}


def generate(model: Any, prompt: torch.Tensor) -> float:
    """Seconds per token."""
    start = time.perf_counter()
    options = {"do_sample": False, "max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return (time.perf_counter() - start) / GENERATED


def spent(model: Any, prompt: torch.Tensor) -> dict[str, float]:
    """Milliseconds per token of CPU time, by what they were spent on."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate(model, prompt)
    totals: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        piece = next((piece for piece, names in PIECES.items() if name in names), "everything else")
        totals[piece] += event.self_cpu_time_total / 1000 / GENERATED
    return totals


def measure(model: str, out: Path, rounds: int) -> None:
    source = resolve_model(model)
    folders = {"dense": source}
    for form in ("pivoted", "plain"):
        folders[form] = str(out / f"{Path(model).name}_{form}")
        if not Path(folders[form]).is_dir():
            options: dict[str, Any] = {"method": "svd", "allocation": "uniform", "form": form}
            lord_tune.decompose(source, folders[form], kept_fraction=KEPT, **options)
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for name, path in folders.items()
    }
    prompt = torch.arange(100, 100 + PROMPT)[None]
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, loaded in models.items():
            seconds = generate(loaded, prompt)
            if turn:  # the first one warms up
                times[name].append(seconds)
    rows = []
    for name, loaded in models.items():
        middle = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name], strict=True))
        pieces = spent(loaded, prompt)
        cells = [f"{pieces[piece]:.1f}" for piece in (*PIECES, "everything else")]
        rows.append([name, f"{1 / middle:.2f}", f"{ratio:.3f} x", *cells])
    columns = ["form", "tokens/s", "dense's time / its time", *(f"{p}, ms" for p in (*PIECES, "everything else"))]
    show_table(f"{Path(model).name}: decoding at batch 1, {KEPT:.0%} of the linears kept, float32", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    for model in given.models:
        measure(model, given.out, given.rounds)


if __name__ == "__main__":
    main()
