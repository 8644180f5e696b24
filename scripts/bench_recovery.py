"""Measure recovery and print it beside its targets, its baselines and the dense control.

    python scripts/bench_recovery.py OUT [--parts nf4 lord blocks memory time] [--only SUBSTRING] [--models DIR]

nf4: initialisations of L and R at equal trainable parameters, steps and data (SmolLM2-135M, NF4, rank 16): whitened,
  LoftQ, QPiSSA (Q = NF4 of what the first 16 singular components leave) and QLoRA (L = 0). Every one is trained at every
  learning rate of the same grid with the first seed; with its best one it is trained with two more.
lord: 20 % of the linears removed, then SFT and distillation; the dense model tuned on the same text is the control.
blocks: block-wise recovery inside `decompose`, no end-to-end training.
memory: QLoRA over LoRD against QLoRA, tensor by tensor.
time: steps of mode factors at 20 % removed against LoRA on the dense model, interleaved.

Text: standard-library files of this Python (top level) to calibrate and train on; its `idlelib` and
`distutils/command`, and WikiText-2 where --wikitext names a file of it, to measure on. One thread per process. Finished
rows are kept in OUT/rows and not measured again, so that several processes may share OUT (--only).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_spine import Bench as SpineBench

import lord_tune
from lord_tune.console import say, show_table
from lord_tune.factorizations import Factors, PlainSVD, truncate
from lord_tune.integrations.models import load, quiet, save_model
from lord_tune.layers import factored_layers, weight_of
from lord_tune.storage import atomic_directory, read_json, write_json

SEEDS = (0, 1, 2)
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
RANK = 16
EVAL = {"max_tokens": 8192, "context_length": 512}
TRAIN = {
    "packing": True,
    "per_device_train_batch_size": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 8,
}
SHORT = {"max_steps": 32, "max_length": 256}
LONG = {"max_steps": 128, "max_length": 512}  # 65,536 tokens


class Bench(SpineBench):
    """Rows measured once and kept, a file each."""

    def __init__(self, folder: Path, wikitext: str | None, only: str):
        super().__init__(folder)
        self.texts = [str(self.held)] + ([wikitext] if wikitext else [])
        self.only = only
        (folder / "rows").mkdir(exist_ok=True)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        path = self.folder / "rows" / f"{name}.json"
        if not path.is_file():
            if self.only not in name:
                return None
            say(f"--- {name}")
            write_json(path, measure())
        return read_json(path)

    def losses(self, model: str) -> dict[str, float]:
        """Text -> held-out loss, nats per token."""
        texts = lord_tune.evaluate(model, text=self.texts, dequantize_once=self.packed(model), **EVAL)["texts"]
        return {"code": texts[self.texts[0]]["loss"]} | (
            {"wikitext": texts[self.texts[1]]["loss"]} if len(self.texts) > 1 else {}
        )

    @staticmethod
    def packed(model: str) -> bool:
        return "nf4" in Path(model).name

    def trained(self, name: str, base: str, **options: Any) -> dict[str, Any] | None:
        """Losses after a run of `train`."""

        def measure() -> dict[str, Any]:
            out = self.folder / "runs" / name
            metrics = lord_tune.train(
                model_name_or_path=base,
                output_dir=str(out),
                dataset_name=str(self.code),
                dequantize_once=self.packed(base),
                **(TRAIN | options),
            )
            seconds = metrics["train_runtime"]
            return {"loss": self.losses(str(out)), "history": metrics["history"], "seconds": seconds}

        return self.once(name, measure)


# --- initialisations beside NF4 ---


def initialised(bench: Bench, kind: str) -> str:
    """A checkpoint W = Q + L R with L and R in float32, rank 16."""
    folder = bench.folder / f"nf4_{kind}"
    if folder.is_dir():
        return str(folder)
    stored = {"backbone": "nf4", "factor_format": "fp32", "rank": RANK}
    if kind == "whitened":
        lord_tune.decompose(bench.dense, str(folder), calibration=[str(bench.code)], calibration_tokens=32768, **stored)
    elif kind == "loftq":
        lord_tune.decompose(bench.dense, str(folder), method="loftq", **stored)
    else:
        plain = bench.folder / "nf4_svd"
        if not plain.is_dir():
            lord_tune.decompose(bench.dense, str(plain), method="svd", **stored)
        model, tokenizer = load(str(plain))
        dense, _ = load(bench.dense)
        generator = torch.Generator().manual_seed(0)
        for name, layer in factored_layers(model).items():
            weight = weight_of(dense.get_submodule(name))
            if kind == "qpissa":
                factors = truncate(weight.double(), PlainSVD().spectrum(weight.double(), None), RANK)
                spread = factors.right.norm(dim=1).sqrt()
                factors = Factors(factors.left * spread, factors.right / spread[:, None])
                layer.backbone.set_parts(layer.backbone.quantizer.quantize(weight - factors.product().float()))
            else:  # QLoRA: R as PEFT draws lora_A (Kaiming, a = sqrt 5), L = 0
                bound = 1 / math.sqrt(weight.shape[1])
                right = (2 * torch.rand(RANK, weight.shape[1], generator=generator) - 1) * bound
                factors = Factors(torch.zeros(weight.shape[0], RANK), right)
            layer.set_factors(factors)
        with atomic_directory(folder) as temporary:
            save_model(model, tokenizer, temporary)
    return str(folder)


def nf4(bench: Bench) -> None:
    rows = []
    for kind in ("whitened", "loftq", "qpissa", "qlora"):
        base = initialised(bench, kind)
        start = bench.once(f"nf4-{kind}-start", lambda base=base: bench.losses(base))
        runs = {
            rate: bench.trained(f"nf4-{kind}-{rate:g}-0", base, learning_rate=rate, seed=0, **SHORT) for rate in GRID
        }
        found = {rate: run["loss"]["code"] for rate, run in runs.items() if run}
        if len(found) < len(GRID):
            continue
        best = min(found, key=lambda rate: found[rate])
        ends = [found[best]]
        for seed in SEEDS[1:]:
            run = bench.trained(f"nf4-{kind}-{best:g}-{seed}", base, learning_rate=best, seed=seed, **SHORT)
            ends += [run["loss"]["code"]] if run else []
        if start:
            grid = ", ".join(f"{found[rate]:.4f}" for rate in GRID)
            rows.append([kind, f"{start['code']:.4f}", spread(ends), f"{best:g}", grid])
    columns = ["L, R", "start", "end: median (min-max) of 3 seeds", "rate", f"seed 0 at {', '.join(map(str, GRID))}"]
    show_table("NF4 + rank 16: held-out loss on code, 32 x 256 tokens", columns, rows)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f}-{max(values):.4f})"


PARTS: dict[str, Callable[[Bench], None]] = {"nf4": nf4}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", default="", help="measure only rows whose name holds this; show what is there")
    parser.add_argument("--wikitext", help="a text file of WikiText-2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    bench = Bench(arguments.out, arguments.wikitext, arguments.only)
    for part in arguments.parts:
        PARTS[part](bench)
