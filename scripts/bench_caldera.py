"""Measure low-precision Q + L R and print it beside its targets and honest baselines.

    python scripts/bench_caldera.py OUT [--parts layer model lord]        about 70 minutes on 2 cores

layer: q_proj and down_proj of SmolLM2's block 10, 8,192 calibration and 4,096 held-out tokens; seconds on one thread.
model: all linears of SmolLM2-135M at about 2 bits, perplexity on other code, beside rounding, LoftQ and feedback alone;
  every decomposition runs as two processes of one thread, as a user with two cores would run it.
lord: LoRD with L and R in low precision.

Calibration: standard-library files of this Python (top level). Held out: its `idlelib` and `distutils/command`.
Finished rows are kept in OUT/bench_caldera.json and not measured again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_spine import EVAL_TOKENS
from bench_spine import Bench as SpineBench
from torch import Tensor

import lord_tune
from lord_tune.adapters.loading import load
from lord_tune.calibration.corpus import token_windows
from lord_tune.calibration.moments import MomentAccumulator, Moments
from lord_tune.console import say, show_table
from lord_tune.data.texts import documents
from lord_tune.factorizations import Caldera, FactorForm, LoftQ, PlainSVD, Split, Whitened, relative_error
from lord_tune.integrations.models import quiet
from lord_tune.quantizers import E8P2, E8P3, E8P4, Int2, Int8, Lloyd2, Lloyd4, Rotated
from lord_tune.storage import read_json, write_json

RANK = 32
BLOCK = 10
LAYER_TOKENS = (8192, 4096)


class Bench(SpineBench):
    """Rows measured once and kept, in a file of their own."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.file = folder / "bench_caldera.json"
        self.rows = read_json(self.file) if self.file.exists() else {}

    def launched(self, name: str, *options: str) -> dict[str, Any]:
        """Perplexity after a decomposition by two processes of one thread each, and its seconds."""

        def measure() -> dict[str, Any]:
            out = self.folder / name
            words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
            words += ["-m", "lord_tune", "decompose", str(self.dense), str(out), "--calibration", str(self.code)]
            environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            start = time.perf_counter()
            subprocess.run([*words, *options, "--overwrite"], env=environment, check=True)
            seconds = time.perf_counter() - start
            totals = read_json(out / "decomposition.json")["totals"]
            found = lord_tune.evaluate(
                str(out), text=[str(self.held)], max_tokens=EVAL_TOKENS, dequantize_once="fp16" not in options
            )
            return found | {"seconds": seconds, "totals": totals}

        return self.once(name, measure)


# --- one layer ---


@dataclass(frozen=True)
class Layer:
    """A weight and the moments of its input on both texts."""

    weight: Tensor
    calibration: Moments
    heldout: Moments

    def measure(self, method: Any, quantizer: Any, rank: int, judged: bool = True) -> dict[str, float]:
        """Errors on both texts, bits and seconds; `judged`: the method may choose by the held-out error."""
        start = time.perf_counter()
        split: Split = method.split(self.weight, self.calibration, rank, quantizer, self.heldout if judged else None)
        seconds = time.perf_counter() - start
        assert split.backbone is not None
        residual = self.weight.double() - split.backbone - split.factors.product()
        errors = [relative_error(residual, self.weight, text) for text in (self.calibration, self.heldout)]
        return {"calibrated": errors[0], "heldout": errors[1], "seconds": seconds, "bits": self._bits(split)}

    def _bits(self, split: Split) -> float:
        """Unrounded factors count 16 bits a number."""
        assert split.parts is not None
        stored = sum(8.0 * t.numel() * t.element_size() for t in split.parts.values())
        pieces = [split.factors] + ([split.factors.top] if split.factors.top else [])
        for factors in pieces:
            for matrix, parts in ((factors.left, factors.left_parts), (factors.right, factors.right_parts)):
                own = None if parts is None else sum(8.0 * t.numel() * t.element_size() for t in parts.values())
                stored += 16.0 * matrix.numel() if own is None else own
        return stored / self.weight.numel()


def layers_of(bench: Bench) -> dict[str, Layer]:
    """q_proj and down_proj of the block, with moments of their inputs."""
    model, tokenizer = load(bench.dense)
    windows = token_windows(documents([str(bench.code)], tokenizer), tokenizer, *LAYER_TOKENS, 1024, 0)
    block = model.model.layers[BLOCK]
    modules = {"q_proj": block.self_attn.q_proj, "down_proj": block.mlp.down_proj}
    found: dict[str, list[Moments]] = {name: [] for name in modules}
    for text in windows:
        sums = {name: MomentAccumulator(module.in_features, module.weight.device) for name, module in modules.items()}

        def observe(name: str, sums: dict[str, MomentAccumulator] = sums) -> Callable:
            return lambda module, args: sums[name].update(args[0])

        handles = [module.register_forward_pre_hook(observe(name)) for name, module in modules.items()]
        with torch.no_grad():
            for window in text:
                model.model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name in modules:
            found[name].append(sums[name].result(name))
    return {name: Layer(module.weight.detach(), *found[name]) for name, module in modules.items()}


E8 = Rotated(E8P2())
LR4 = FactorForm(Rotated(Lloyd4()))
ALONE = "feedback alone, E8 2 bit"
BEST = f"CALDERA, E8 2 bit, rank {RANK} in 16 bit"
FITTED = BEST + ", damping by calibration text"
LOFTQ = f"LoftQ, Lloyd 2 bit, rank {RANK}, 5 iterations"
ROUNDED = f"rounding (int2) + plain SVD, rank {RANK}"
METHODS: list[tuple[str, Any, Any, int]] = [
    ("rounding, int2 groups of 64", PlainSVD(), Int2(), 0),
    (ROUNDED, PlainSVD(), Int2(), RANK),
    (f"rounding (int2) + whitened, rank {RANK}", Whitened(0.0), Int2(), RANK),
    (LOFTQ, LoftQ(), Lloyd2(), RANK),
    (ALONE, Caldera(), E8, 0),
    ("feedback alone, Lloyd 2 bit rotated", Caldera(), Rotated(Lloyd2()), 0),
    ("feedback alone, E8 3 bit", Caldera(), Rotated(E8P3()), 0),
    ("feedback alone, E8 4 bit", Caldera(), Rotated(E8P4()), 0),
    (BEST + ", 1 iteration", Caldera(iterations=1), E8, RANK),
    (BEST, Caldera(), E8, RANK),
    (BEST + ", no down-date", Caldera(downdate="off"), E8, RANK),
    (FITTED, Caldera(), E8, RANK),
    (BEST + ", Q first", Caldera(order="q"), E8, RANK),
    (f"CALDERA, E8 2 bit, rank {RANK} in int8", Caldera(factor_form=FactorForm(Int8())), E8, RANK),
    (f"CALDERA, E8 2 bit, rank {RANK} in 4 bit", Caldera(factor_form=LR4), E8, RANK),
    (f"CALDERA, E8 2 bit, rank {RANK} in 4 bit, first 8 in int8",
     Caldera(factor_form=FactorForm(Rotated(Lloyd4()), 8, Int8())), E8, RANK),
    (f"CALDERA, E8 2 bit, rank {RANK} in 2 bit (E8)", Caldera(factor_form=FactorForm(E8)), E8, RANK),
]  # fmt: skip
# error on the calibration text relative to another row's: methods_qlr.md 6.4, item 5
BARS = [(ALONE, 0.90), (LOFTQ, 0.55), (ROUNDED, 0.35)]


def layer(bench: Bench) -> None:
    torch.set_num_threads(1)
    found: dict[str, Layer] = {}
    for name in ("q_proj", "down_proj"):
        rows = []
        for label, method, quantizer, rank in METHODS:

            def measure(
                name: str = name, label: str = label, method: Any = method, quantizer: Any = quantizer, rank: int = rank
            ) -> dict[str, float]:
                if not found:
                    found.update(layers_of(bench))
                return found[name].measure(method, quantizer, rank, judged=label != FITTED)

            entry = bench.once(f"layer {name}: {label}", measure)
            rows.append([label, *(f"{entry[key]:.4f}" for key in ("calibrated", "heldout")), f"{entry['bits']:.2f}"])
            rows[-1].append(f"{entry['seconds']:.1f}")
        show_table(
            f"{name} of block {BLOCK}: relative error of its output",
            ["", "calibrated", "held-out", "bits/weight", "seconds"],
            rows,
        )
        for other, bar in BARS:
            reference = bench.rows[f"layer {name}: {other}"]
            for label, text in ((BEST, "calibrated"), (BEST, "heldout"), (FITTED, "calibrated")):
                ratio = bench.rows[f"layer {name}: {label}"][text] / reference[text]
                missed = "" if ratio <= bar else ", missed"
                say(f"{name}, {text}, '{label}': {ratio:.3f} of '{other}' (target {bar}{missed})")
    torch.set_num_threads(os.cpu_count() or 1)


# --- the whole model ---

_FACTORS = ("--rank", str(RANK), "--factor-format", "lloyd4")
_TOP = ("--top-rank", "8", "--top-format", "fp16")
MODEL: list[tuple[str, str, tuple[str, ...]]] = [
    ("e8-2_caldera", "CALDERA, E8 2 bit", ("--method", "caldera", "--backbone", "e8-2", *_FACTORS)),
    ("e8-2_caldera_top", "CALDERA, first 8 in fp16", ("--method", "caldera", "--backbone", "e8-2", *_FACTORS, *_TOP)),
    ("nf4_caldera", "CALDERA, NF4, rank 16", ("--method", "caldera", "--backbone", "nf4", "--rank", "16")),
    ("int2", "rounding, int2 groups of 64", ("--method", "svd", "--backbone", "int2", "--rank", "0")),
    ("lloyd2", "rounding, Lloyd 2 bit rotated", ("--method", "svd", "--backbone", "lloyd2", "--rank", "0")),
    ("lloyd2_loftq", "Lloyd 2 bit + LoftQ", ("--method", "loftq", "--backbone", "lloyd2", *_FACTORS)),
    ("e8-2_loftq", "E8 2 bit + LoftQ", ("--method", "loftq", "--backbone", "e8-2", *_FACTORS)),
    ("e8-2_whitened", "E8 2 bit + whitened", ("--backbone", "e8-2", *_FACTORS)),
    ("e8-2_ldlq", "feedback alone, E8 2 bit", ("--method", "caldera", "--backbone", "e8-2", "--rank", "0")),
    ("e8-3_ldlq", "feedback alone, E8 3 bit", ("--method", "caldera", "--backbone", "e8-3", "--rank", "0")),
    ("e8-4_ldlq", "feedback alone, E8 4 bit", ("--method", "caldera", "--backbone", "e8-4", "--rank", "0")),
    ("spqr_ldlq", "feedback alone, SpQR 3 bit", ("--method", "caldera", "--backbone", "spqr", "--rank", "0")),
]
MINUTES = {"e8-2_caldera": 10.0, "nf4_caldera": 6.0, "e8-2_ldlq": 4.0}


def model(bench: Bench) -> None:
    dense = bench.once("dense", lambda: bench.perplexity(bench.dense))
    rows = [["dense", f"{dense['perplexity']:.2f}", f"{dense['linear_bits_per_weight']:.2f}", "", ""]]
    for name, label, options in MODEL:
        entry = bench.launched(name, *options)
        limit = MINUTES.get(name)
        minutes = entry["seconds"] / 60
        target = "" if limit is None else f"<= {limit:g}{'' if minutes <= limit else ', missed'}"
        bits = entry["linear_bits_per_weight"]
        rows.append([label, f"{entry['perplexity']:.2f}", f"{bits:.2f}", f"{minutes:.1f}", target])
    trained = bench.recovered("e8-2_caldera_top", mode="split", dequantize_once=True)
    bits, seconds = trained["linear_bits_per_weight"], trained["train_seconds"]
    label = "CALDERA, first 8 trained (split), 32 steps of 256 tokens"
    rows.append([label, f"{trained['perplexity']:.2f}", f"{bits:.2f}", f"{seconds / 60:.1f}", ""])
    show_table(
        f"SmolLM2-135M, L R of rank {RANK} in 4 bit where there is one; minutes on 2 processes of one thread",
        ["", "perplexity", "bits/weight of the linears", "minutes", "target"],
        rows,
    )


# --- low precision over LoRD ---

LORD = ("--kept-fraction", "0.9")
FORMS = ("fp16", "nf4", "int4", "lloyd4", "e8-4", "spqr", "e8-3", "e8-2")


def lord(bench: Bench) -> None:
    dense = bench.once("dense", lambda: bench.perplexity(bench.dense))
    rows = []
    for form in FORMS:
        entry = bench.launched(f"lord_{form}", *LORD, "--factor-format", form)
        rows.append([form, f"{entry['perplexity']:.2f}", f"{entry['linear_bits_per_weight']:.2f}"])
    show_table(
        f"LoRD, 10 % removed, loss_weighted, L and R in low precision (dense layers stay dense); dense "
        f"{dense['perplexity']:.2f}",
        ["L and R", "perplexity", "bits/weight of the linears"],
        rows,
    )


PARTS = {"layer": layer, "model": model, "lord": lord}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    quiet()
    measured = Bench(given.out)
    for part in given.parts:
        PARTS[part](measured)
    write_json(measured.file, measured.rows)
