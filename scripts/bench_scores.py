"""Task scores of decomposed models beside the model as it is.

    python scripts/bench_scores.py OUT MODEL --tasks-dir DIR --tasks humaneval --calibration FILE [--train FILE]
                                   [--texts FILE ...] [--rows dense nf4 ...] [--limit N]

Every row decomposes MODEL from the same calibration text (16,384 tokens), is trained on where the row says so, and
then answers the same questions (greedily, 384 new tokens at most, 10 at once) and reads the same texts (8,192 tokens
each in windows of 512). Rows are kept in OUT/rows, a file each, and not measured again; two processes may measure
different rows (--rows). Programs that a model wrote are run in limited processes.

Choices are averaged over the tasks (lm-eval's acc_norm where a task has it, else acc), with the standard error of that.

`lord_10` removes 10 % of the numbers of the model, embeddings counted once, as the LoRD paper counts; all of it comes
from the linears of the blocks.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import lord_tune
from lord_tune.console import say, show_table
from lord_tune.integrations.models import quiet
from lord_tune.storage import read_json, write_json

REMOVED = {"lord_10": 0.10, "lord_15": 0.15, "lord_20": 0.20}  # of the model's numbers
DECOMPOSED: dict[str, dict[str, Any]] = {
    "nf4": {"backbone": "nf4", "rank": 0},
    "nf4_r16": {"backbone": "nf4", "rank": 16, "factor_format": "bf16"},
    "caldera_2.5": {"method": "caldera", "backbone": "e8-2", "rank": 32, "factor_format": "lloyd4"},
    "mixed_2.5": {"allocation": "mixed", "mix": ["e8-2", "int3", "e8-3", "nf4"], "bits_per_weight": 2.5, "rank": 0},
    "mixed_3": {"allocation": "mixed", "mix": ["e8-2", "int3", "e8-3", "nf4"], "bits_per_weight": 3.0, "rank": 0},
}
GENERATED = {"humaneval", "mbpp", "gsm8k"}  # all other tasks are choices, which are averaged
TRAINED = "_trained"  # ending of the rows that distil the original into what the row before it made
TRAINING: dict[str, Any] = {
    "mode": "factors",
    "objective": "distill",
    "max_steps": 64,
    "max_length": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "packing": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ROWS = ("dense", *DECOMPOSED, *(name + ending for name in REMOVED for ending in ("", TRAINED)))


def kept_fraction(model: str, removed: float) -> float:
    """Of the linears, so that `removed` of the model's numbers are gone."""
    found = lord_tune.plan(model, rank=8)
    parameters, parts = found["parameters"], found["bytes_by_part"]
    if parts["head"]:  # a head of its own, which the original may share with the embeddings
        parameters -= parameters * parts["head"] / found["model_bytes"]
    kept: float = 1 - removed * parameters / found["linear_parameters"]
    return kept


def made(given: argparse.Namespace, name: str) -> str:
    """The folder of a row's model."""
    if name == "dense":
        return str(given.model)
    folder = given.out / "models" / name
    if folder.is_dir():
        return str(folder)
    if name.endswith(TRAINED):
        base = made(given, name.removesuffix(TRAINED))
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        lord_tune.train(model_name_or_path=base, output_dir=str(partial), dataset_name=given.train, **TRAINING)
        partial.rename(folder)
        return str(folder)
    options = {"kept_fraction": kept_fraction(given.model, REMOVED[name])} if name in REMOVED else DECOMPOSED[name]
    lord_tune.decompose(given.model, str(folder), calibration=given.calibration, calibration_tokens=16384, **options)
    return str(folder)


def measured(given: argparse.Namespace, name: str) -> dict[str, Any]:
    start = time.perf_counter()
    model = made(given, name)
    seconds = time.perf_counter() - start
    options: dict[str, Any] = {"tasks": given.tasks, "tasks_dir": given.tasks_dir, "limit": given.limit}
    if {"humaneval", "mbpp"} & set(given.tasks):
        options |= {"confirm_run_unsafe_code": True, "max_new_tokens": 384}
    packed = name not in ("dense", *REMOVED, *(removed + TRAINED for removed in REMOVED))
    found = lord_tune.evaluate(
        model, text=given.texts, max_tokens=8192, context_length=512, batch_size=10, dequantize_once=packed, **options
    )
    return {"seconds": seconds, "evaluated": found}


def shown(name: str, row: dict[str, Any], tasks: list[str]) -> list[str]:
    found = row["evaluated"]
    chosen: list[tuple[float, float]] = []  # share of right choices, and its standard error
    cells = [f"{found['model_bytes'] / 1e6:.0f} MB"]
    cells += [f"{text['perplexity']:.3f}" for text in found["texts"].values()]
    for task in tasks:
        entry = found["tasks"].get(task, {})
        if "pass@1" in entry:
            low, high = entry["pass@1_interval"]
            solved, problems = entry["solved_problems"], entry["problems"]
            cells.append(f"{solved} of {problems} ({100 * low:.0f}-{100 * high:.0f} %)")
            continue
        key = next((key for key in ("acc_norm", "acc") if key in entry), None)
        cells.append(f"{100 * entry[key]:.1f} % of {entry['items']}" if key else "-")
        if key:
            chosen.append((entry[key], entry[f"{key}_stderr"]))
    if chosen:
        error = math.sqrt(sum(error**2 for _, error in chosen)) / len(chosen)
        cells.append(f"{100 * statistics.mean(share for share, _ in chosen):.1f} +- {100 * error:.1f} %")
    return [name, *cells, f"{row['seconds']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--tasks-dir", required=True)
    parser.add_argument("--tasks", nargs="+", default=["humaneval"])
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--train", help="text of the rows that are trained; the calibration's first file without it")
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    given.train = given.train or given.calibration[0]
    quiet()
    (given.out / "rows").mkdir(parents=True, exist_ok=True)
    for name in given.rows:
        path = given.out / "rows" / f"{name}.json"
        if not path.is_file():
            say(f"--- {name}")
            write_json(path, measured(given, name))
    known = {name: given.out / "rows" / f"{name}.json" for name in ROWS}
    rows = [shown(name, read_json(path), given.tasks) for name, path in known.items() if path.is_file()]
    several = ["average"] if set(given.tasks) - GENERATED else []
    texts = [Path(text).name for text in given.texts]
    show_table("scores", ["row", "size", *texts, *given.tasks, *several, "seconds"], rows)


if __name__ == "__main__":
    main()
