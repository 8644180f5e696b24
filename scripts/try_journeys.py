"""Do what seven kinds of users do, command by command, and say how many commands and minutes each took.

    python scripts/try_journeys.py OUT [--model demo] [--only LETTERS] [--small]

a  an engineer with an 8B model and one GPU of 24 GB: does it fit? Then the same commands on MODEL.
b  a researcher who compares methods at one size.
c  someone with own chats in a CSV file who wants to talk to the result.
d  someone with a limit in megabytes.
e  an author of a method: one file and one row of a test (CONTRIBUTING.md; its examples are run by tests).
f  someone who works in a notebook.
g  someone who mistypes: every command is refused by one sentence, and nothing is written.

Own data is made in OUT/data: code of the standard library, and questions about its functions, answered by their
docstrings. --small is for tests: few tokens and steps.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from lord_tune.console import say, show_table
from lord_tune.demo import standard_library_files, write_rows

ROOT = Path(__file__).parent.parent
MODULES = ("os", "json", "re", "random", "statistics", "textwrap", "shutil", "pathlib", "datetime", "csv", "heapq")
EIGHT_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
TRAINED = "--max_length 256 --per_device_train_batch_size 2 --max_steps {steps}"
JOURNEYS: dict[str, tuple[str, ...]] = {
    "a": (
        "lord-tune plan {out}/llama_8b --backbone nf4 --rank 64 --method loftq --gpu-memory 24GB",
        "lord-tune decompose {model} {out}/a_nf4 --backbone nf4 --rank 16 --factor-format bf16 {calibrated}",
        "lord-tune train --model_name_or_path {out}/a_nf4 --dataset_name {code} --output_dir {out}/a_sft " + TRAINED,
        "lord-tune evaluate {out}/a_sft --text {held} --max-tokens {tokens}",
        "lord-tune export {out}/a_sft {out}/a_peft --format peft",
    ),
    "b": (
        "lord-tune compare {model} {out}/b --methods loftq whitened:backbone=lloyd3 rounding --bits-per-weight {bits} "
        "{calibrated} --text {held} --max-tokens {tokens}",
    ),
    "c": (
        "lord-tune decompose {model} {out}/c_nf4 --backbone nf4 --rank 16 --factor-format bf16 --calibration {chats} "
        "--calibration-tokens {tokens}",
        "lord-tune train --model_name_or_path {out}/c_nf4 --dataset_name {chats} --output_dir {out}/c_sft " + TRAINED,
        "lord-tune chat {out}/c_sft --prompt 'What does json.dumps do?' --max-new-tokens 48",
    ),
    "d": ("lord-tune decompose {model} {out}/d --embeddings int8 --max-bytes {size} --allocation mixed {calibrated}",),
    "f": ("jupyter execute {root}/recipes/notebooks/decompose_and_train.ipynb",),
    "g": (
        "lord-tune decompos {model} {out}/g",
        "lord-tune decompose {model} {out}/g --rnak 8",
        "lord-tune decompose {model} {out}/g --rank 8 --method whitend",
        "lord-tune decompose {out}/no_model {out}/g --rank 8 --method svd",
        "lord-tune decompose {model} {out}/g --backbone nf5 --rank 8 --method loftq",
        "lord-tune decompose {model} {out}/g --rank 8 --calibration {out}/data/no_file.jsonl",
        "lord-tune train --model_name_or_path {model} --dataset_name {code} --output_dir {out}/g --max_step 3",
        "lord-tune export {model} {out}/g --format gguff",
        "lord-tune evaluate {model} --text {out}/data/no_file.jsonl",
    ),
}
MISTYPED = "g"


@dataclass(frozen=True)
class Ran:
    """What came of one command."""

    command: str
    code: int
    seconds: float
    errors: str


def make_inputs(out: Path, small: bool) -> None:
    """OUT/data and the bare configuration of a model of 8 billion parameters; where small, of two of its layers."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, files in zip(("code_train", "code_heldout"), standard_library_files(), strict=True):
        write_rows(files, data / f"{name}.jsonl")
    with (data / "chats.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "response"])
        for module in map(importlib.import_module, MODULES):
            for name, thing in inspect.getmembers(module, inspect.isroutine):
                told = (inspect.getdoc(thing) or "").split("\n\n")
                if not name.startswith("_") and len(told[0]) > 20:
                    writer.writerow([f"What does {module.__name__}.{name} do?", "\n\n".join(told[:2])])
    LlamaConfig(**EIGHT_BILLION | ({"num_hidden_layers": 2} if small else {})).save_pretrained(out / "llama_8b")


def by_shell(command: str) -> Ran:
    """As it was typed; a program of lord_tune is that of this Python."""
    words = shlex.split(command)
    if words[0] == "lord-tune":
        words[:1] = [sys.executable, "-m", "lord_tune"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    return Ran(command, done.returncode, time.perf_counter() - start, done.stderr)


def filled(out: Path, model: str, small: bool) -> dict[str, str | int]:
    """Values of the placeholders in JOURNEYS."""
    code, tokens = f"{out}/data/code_train.jsonl", 512 if small else 4096
    return {
        "root": str(ROOT),
        "out": str(out),
        "model": model,
        "code": code,
        "held": f"{out}/data/code_heldout.jsonl",
        "chats": f"{out}/data/chats.csv",
        "tokens": tokens,
        "steps": 2 if small else 32,
        "bits": 9 if small else 4.5,
        "size": "250KB" if small else "80MB",
        "calibrated": f"--calibration {code} --calibration-tokens {512 if small else 16384}"
        + (" --context-length 64" if small else ""),
    }


def go(letter: str, values: dict[str, str | int], run: Callable[[str], Ran]) -> list[Ran]:
    """A journey ends at the first command that fails, unless all are meant to."""
    found: list[Ran] = []
    for command in JOURNEYS[letter]:
        say(f"$ {command.format(**values)}")
        found.append(run(command.format(**values)))
        if found[-1].code and letter != MISTYPED:
            break
    return found


def went_well(letter: str, ran: list[Ran]) -> bool:
    if letter != MISTYPED:
        return all(not one.code for one in ran)
    return all(one.code in (1, 2) and one.errors.count("error: ") == 1 for one in ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", default="".join(JOURNEYS), help="letters of the journeys")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    out = given.out.resolve()
    make_inputs(out, given.small)
    rows, failed = [], False
    for letter in given.only:
        ran = go(letter, filled(out, given.model, given.small), by_shell)
        good = went_well(letter, ran)
        failed |= not good
        if not good or letter == MISTYPED:
            say("\n".join(one.errors.strip() for one in ran))
        minutes = sum(one.seconds for one in ran) / 60
        rows.append([letter, str(len(JOURNEYS[letter])), f"{minutes:.1f}", "yes" if good else "no"])
    show_table("journeys", ["who", "commands", "minutes", "as wanted"], rows)
    sys.exit(failed)


if __name__ == "__main__":
    main()
