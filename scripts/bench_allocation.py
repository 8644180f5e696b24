"""Where the parameters and the bits go: one-shot perplexity of allocators, methods and forms at equal size.

    python scripts/bench_allocation.py OUT --wikitext VALID.txt --wikitext-train TRAIN.txt [--only NAME] [--parts ...]

Model `demo` (SmolLM2-135M), 16,384 tokens to calibrate on, held-out code (packages that the calibration never sees) and
WikiText-2, 8,192 tokens each in windows of 512. Rows are kept in OUT/rows, a file each, and not measured again; two
processes may measure different rows (--only). About 5 minutes a row on one thread.

SmolLM2's wheel holds its linears on a 4-bit grid (Q4_1), which int4 would reproduce: the mixtures leave it out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from bench_recovery import Bench as RecoveryBench

import lord_tune
from lord_tune.console import show_table
from lord_tune.integrations.models import quiet
from lord_tune.storage import read_json, write_json

TARGETS = {0.9: 1.05, 0.8: 1.17, 0.7: 1.45, 0.6: 2.1}  # of dense perplexity, by kept fraction
MIX = ["int2", "e8-2", "int3", "e8-3", "nf4", "e8-4", "int8"]


class Bench(RecoveryBench):
    """One decomposition and its perplexities a row."""

    def __init__(self, folder: Path, wikitext: str, wikitext_train: str, only: str):
        super().__init__(folder, wikitext, only)
        self.prose = wikitext_train

    def row(self, name: str, mixed_text: bool = False, **options: Any) -> dict[str, Any] | None:
        def measure() -> dict[str, Any]:
            text = [f"{self.code}:0.5", f"{self.prose}:0.5"] if mixed_text else [str(self.code)]
            start, used = time.perf_counter(), time.process_time()
            report = lord_tune.decompose(
                self.dense,
                str(self.folder / name),
                overwrite=True,
                calibration=text,
                calibration_tokens=16384,
                **options,
            )
            seconds, used = time.perf_counter() - start, time.process_time() - used
            kept = {key: report[key] for key in ("control", "heldout_losses", "refined", "search") if key in report}
            kept.get("control", {}).pop("plan", None)
            return {
                "totals": report["totals"],
                "seconds": seconds,
                "cpu_seconds": used,
                "loss": self.losses(str(self.folder / name)),
                **kept,
            }

        return self.once(name, measure)


BOLACO: dict[str, Any] = {"allocation": "bolaco", "probes": 10, "validation_tokens": 2048}  # minutes on one core
LORD: dict[str, dict[str, Any]] = {
    "plain_whitened": {"form": "plain"},
    "pivoted_whitened": {},
    "pivoted_two_sided": {"method": "two_sided"},
    "pivoted_two_sided_mixed_text": {"method": "two_sided", "mixed_text": True},
    "pivoted_two_sided_refined": {"method": "two_sided", "refine": 6},
    "pivoted_uniform": {"allocation": "uniform"},
    "pivoted_energy": {"allocation": "energy"},
    "pivoted_typed": {"allocation": "typed"},
    "pivoted_bolaco": BOLACO,
    "pivoted_bolaco_two_sided": BOLACO | {"method": "two_sided"},
}
BITS = {
    "mixed": {"allocation": "mixed", "mix": MIX, "measure_control": True},
    "mixed_alone": {"allocation": "mixed", "mix": MIX, "rank": 0},
    "mixed_scalars": {"allocation": "mixed", "mix": ["int2", "int3", "nf4", "int8"], "rank": 0},
    "mixed_two_sided": {"allocation": "mixed", "mix": MIX, "method": "two_sided"},
}
SINGLE = {
    "e8-2_r16": {"backbone": "e8-2", "rank": 16},
    "int3_r0": {"backbone": "int3", "rank": 0},
    "e8-3_r0": {"backbone": "e8-3", "rank": 0},
    "int3_r8": {"backbone": "int3", "rank": 8},
    "e8-4_r0": {"backbone": "e8-4", "rank": 0},
    "e8-3_r32": {"backbone": "e8-3", "rank": 32},
}


def shown(name: str, row: dict[str, Any] | None, dense: dict[str, Any]) -> list[str]:
    if row is None:
        return [name, "-", "-", "-", "-", "-"]
    cells = []
    for text in ("code", "wikitext"):
        own, whole = (math.exp(entry["loss"][text]) for entry in (row, dense))
        cells.append(f"{own:.3f} ({own / whole:.3f} x)")
    totals = row["totals"]
    size = f"{totals['model_bytes'] / 1e6:.1f} MB"
    return [name, size, f"{totals['linear_bits_per_weight']:.2f}", *cells, f"{row['seconds']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--wikitext-train", required=True)
    parser.add_argument("--parts", nargs="*", default=["lord", "bits"], choices=["lord", "bits"])
    parser.add_argument("--only", default="", help="measure rows with this in their names; show all that are there")
    given = parser.parse_args()
    quiet()
    bench = Bench(given.out, given.wikitext, given.wikitext_train, given.only)
    whole = bench.folder / "rows" / "dense.json"
    dense = read_json(whole) if whole.is_file() else {"loss": bench.losses(bench.dense)}  # all rows are read by it
    write_json(whole, dense)
    columns = ["row", "checkpoint", "bits/weight", "held-out code", "WikiText-2", "seconds"]
    if "lord" in given.parts:
        for kept, target in TARGETS.items():
            rows = []
            for name, options in LORD.items():
                full = f"{name}_{round(100 * (1 - kept))}"
                rows.append(shown(full, bench.row(full, kept_fraction=kept, **options), dense))
            show_table(f"{1 - kept:.0%} of the linears' parameters removed (target on code {target} x)", columns, rows)
    if "bits" in given.parts:
        rows = []
        for bits in (2.5, 3.0, 3.5, 4.0):
            for name, options in BITS.items():
                full = f"{name}_{bits:g}"
                rows.append(shown(full, bench.row(full, bits_per_weight=bits, **options), dense))
        for name, options in SINGLE.items():
            single: dict[str, Any] = {"factor_format": "bf16"} | options if options["rank"] else options
            rows.append(shown(name, bench.row(name, **single), dense))
        show_table("mixtures of formats and ranks, and single formats", columns, rows)


if __name__ == "__main__":
    main()
