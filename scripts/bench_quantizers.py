"""Measure the storage formats on one thread and print the figures beside their targets.

    python scripts/bench_quantizers.py OUT [--formats nf4 spqr ...]     about a minute

Bits: stored bytes of a 4096 x 4096 matrix. Error: mean squared, of a million normal weights of variance 1 in rows of
4,096. Encode: quantize of the same million. Decode: dequantize to float32 of 4096 x 4096 and of 1536 x 576, medians of
interleaved repeats; allocating the result counts, as it does in use (touching fresh memory alone runs at about 650).
Feedback: milliseconds of LDLQ. Rates are millions of weights per second of CPU time, so that other programs on the
machine count little. Everything goes to OUT/bench_quantizers.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lord_tune.console import show_table
from lord_tune.quantizers import E8P2, NF4, QUANTIZERS, Int2, Int3, Int4, Int8, SpQR
from lord_tune.quantizers.e8 import nearest_words
from lord_tune.quantizers.ldlq import Feedback, ldlq
from lord_tune.storage import write_json

LARGE, SMALL = (4096, 4096), (1536, 576)
FORMS = {form.name: form() for form in QUANTIZERS.values()} | {
    "nf4, double quantization": NF4(double_quant=True),
    "int2, symmetric": Int2(symmetric=True),
    "int3, symmetric": Int3(symmetric=True),
    "int4, symmetric": Int4(symmetric=True),
    "int8, symmetric": Int8(symmetric=True),
    "spqr, 4 bits": SpQR(bits=4),
}
DECODE = 300.0  # million weights per second
SEARCH = 4.0
# the stored bits of the formats' formulas and the errors of normal weights that a correct code has
BITS = {"nf4": 4.5, "nf4, double quantization": 4.127, "int2": 2.5, "int3": 3.5, "int4": 4.5, "int8": 8.5}
BITS |= {f"int{b}, symmetric": b + 0.25 for b in (2, 3, 4, 8)} | {f"lloyd{b}": b + 0.25 for b in (2, 3, 4)}
BITS |= {f"e8-{b}": b + 16 / 4096 for b in (2, 3, 4)} | {"spqr": 3.953, "spqr, 4 bits": 4.953}
BITS |= {"q2_0": 2.25, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5}
BITS |= {f"w{b}a16": b + 0.125 for b in (2, 4, 8)}
ERRORS = {"e8-2": 0.0922, "e8-3": 0.0305, "e8-4": 0.0093}


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(works: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median CPU seconds of each, after one round that fills tables and caches."""
    for work in works:
        work()
    rounds = [[seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def stored_bits(parts: dict[str, torch.Tensor], shape: tuple[int, int]) -> float:
    return 8 * sum(t.numel() * t.element_size() for t in parts.values()) / (shape[0] * shape[1])


def decoding(form: Any, parts: dict[str, torch.Tensor], shape: tuple[int, int]) -> Callable[[], Any]:
    return lambda: form.dequantize(parts, shape, torch.float32)


def measure(forms: dict[str, Any]) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(256, LARGE[1], generator=generator)
    rows: dict[str, dict[str, float]] = {}
    for name, form in forms.items():
        parts = form.quantize(sample)
        q = form.dequantize(parts, (256, LARGE[1]), torch.float32)
        rows[name] = {
            "bits": stored_bits(form.empty(LARGE, "meta"), LARGE),
            "error": float((sample - q).square().mean()),
        }
    encode = interleaved([lambda form=form: form.quantize(sample) for form in forms.values()], 3)
    for name, taken in zip(forms, encode, strict=True):
        rows[name]["encode"] = sample.numel() / taken / 1e6
    for label, shape, repeats in (("decode", LARGE, 9), ("decode_small", SMALL, 51)):
        weight = torch.randn(shape, generator=generator)
        stored = [(form, form.quantize(weight)) for form in forms.values()]
        works = [decoding(form, parts, shape) for form, parts in stored]
        for name, taken in zip(forms, interleaved(works, repeats), strict=True):
            rows[name][label] = weight.numel() / taken / 1e6
    return rows


def measure_search() -> dict[str, float]:
    """The E8 search by number of rows, and feedback rounding."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    sizes = (200, 576, 3000, 131072)
    batches = [torch.randn(n, 8, generator=generator) * E8P2.best_scale for n in sizes]
    for n, taken in zip(sizes, interleaved([lambda x=x: nearest_words(x) for x in batches], 9), strict=True):
        found[f"search, {n} x 8"] = n * 8 / taken / 1e6
    for shape in ((576, 576), (576, 1536)):
        weight = torch.randn(shape, generator=generator)
        x = torch.randn(4 * shape[1], shape[1], generator=generator, dtype=torch.float64)
        gram = x.T @ x / len(x)
        for name in ("e8-2", "e8-3", "e8-4"):
            form = FORMS[name]
            rounder = form.rounder(weight)
            feedback = Feedback.of(gram, 1e-2, rounder.block)
            work = [lambda form=form, w=weight, f=feedback: ldlq(w, f, form.rounder(w))]
            found[f"feedback, {name}, {shape[0]} x {shape[1]}, ms"] = 1e3 * interleaved(work, 5)[0]
    return found


def beside(value: float, target: float | None, at_least: bool, digits: int) -> str:
    """The figure, its target and whether it is missed."""
    text = f"{value:.{digits}f}"
    if target is None:
        return text
    missed = value < target if at_least else value > target
    return f"{text} ({'>=' if at_least else '<='} {target:g}{', missed' if missed else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    formats = measure({name: FORMS[name] for name in arguments.formats})
    search = measure_search()
    result = {"torch": torch.__version__, "threads": 1, "formats": formats, "search": search}
    write_json(arguments.out / "bench_quantizers.json", result)
    table = [
        [
            name,
            beside(row["bits"], BITS[name] * 1.01, False, 3),
            beside(row["error"], ERRORS.get(name), False, 5),
            f"{row['encode']:.1f}",
            beside(row["decode"], DECODE, True, 0),
            beside(row["decode_small"], DECODE, True, 0),
        ]
        for name, row in formats.items()
    ]
    columns = ["", "bits per weight", "error", "encode", "decode 4096 x 4096", "decode 1536 x 576"]
    show_table("formats, million weights per CPU second on one thread", columns, table)
    target = {"search, 131072 x 8": SEARCH}
    table = [[name, beside(value, target.get(name), True, 1)] for name, value in search.items()]
    show_table("E8, million weights per CPU second, or milliseconds", ["", "measured"], table)


if __name__ == "__main__":
    main()
