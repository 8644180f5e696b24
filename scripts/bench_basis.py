"""Measure Basis Selection against truncated singular values, at equal steps of training.

    python scripts/bench_basis.py OUT --train FILE --held FILE [--kept 0.6] [--svd 0.6 0.9] [--steps 96] [--length 512]

SmolLM2-135M, one thread, no calibration text. Both kinds of rows are trained on the same tokens in the same order:

basis F   all singular values of every linear (`decompose --full-rank`), pruned to the fraction F of the numbers in the
          first half of the steps (`train --mode basis`), exported, and its factors trained for the other half
svd F     the largest singular values that fit the fraction F (`decompose --method svd --allocation uniform`), and their
          factors trained for all steps

FILE is rows with `prompt` and `response` (as text, one after the other), or with `text`. Losses are on the whole text
of the held-out rows, nats per token. Finished rows are kept in OUT/rows and not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lord_tune
from lord_tune.console import say, show_table
from lord_tune.storage import read_json, write_json

TRAIN = {
    "packing": True,
    "packing_strategy": "bfd_split",
    "per_device_train_batch_size": 1,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 8,
}


class Bench:
    def __init__(self, out: Path, train: Path, held: Path, tokens: int, length: int):
        self.out, self.tokens, self.length = out, tokens, length
        (out / "rows").mkdir(parents=True, exist_ok=True)
        self.rows, self.held = (self._texts(path) for path in (train, held))

    def _texts(self, path: Path) -> Path:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [row["text"] if "text" in row else f"{row['prompt']}\n{row['response']}\n" for row in rows]
        found = self.out / path.name
        found.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return found

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        path = self.out / "rows" / f"{name}.json"
        if not path.is_file():
            say(f"--- {name}")
            write_json(path, measure())
        return read_json(path)

    def decomposed(self, name: str, **options: Any) -> str:
        folder = self.out / name
        if not folder.is_dir():
            lord_tune.decompose("demo", str(folder), method="svd", **options)
        return str(folder)

    def trained(self, base: str, name: str, **options: Any) -> tuple[str, dict[str, Any]]:
        folder = self.out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was stopped
        given = TRAIN | {"max_length": self.length} | options
        return str(folder), lord_tune.train(
            model_name_or_path=base, dataset_name=str(self.rows), output_dir=str(folder), **given
        )

    def loss(self, model: str) -> float:
        found = lord_tune.evaluate(model, [str(self.held)], context_length=512, max_tokens=self.tokens)
        return float(found["loss"])

    def dense(self) -> dict[str, Any]:
        return self.once("dense", lambda: {"before": self.loss("demo")})

    def svd(self, kept: float, rate: float, steps: int) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            base = self.decomposed(f"svd_{kept:g}", kept_fraction=kept, allocation="uniform")
            run, metrics = self.trained(base, f"svd_{kept:g}_{rate:g}", max_steps=steps, learning_rate=rate)
            before = self.loss(base)
            return {"before": before, "loss": self.loss(run), "seconds": metrics["train_runtime"]}

        return self.once(f"svd_{kept:g}_{rate:g}_{steps}", measure)

    def basis(self, kept: float, rates: tuple[float, float], steps: int, new: int) -> dict[str, Any]:
        """rates: of the singular values, of the factors afterwards."""
        first, name = steps // 2, f"basis_{kept:g}_{rates[0]:g}_{steps}_{new}"

        def pruned() -> dict[str, Any]:
            base = self.decomposed("whole", full_rank=True)
            options = {"basis_kept_fraction": kept, "basis_new": new, "basis_every": 4, "basis_start": 1 / 6}
            run, metrics = self.trained(base, name, mode="basis", max_steps=first, learning_rate=rates[0], **options)
            shutil.rmtree(self.out / name, ignore_errors=True)
            lord_tune.export(run, str(self.out / name), format="factored")
            return {"seconds": metrics["train_runtime"], "numbers": metrics["basis"]["numbers"], "loss": self.loss(run)}

        def measure() -> dict[str, Any]:
            run, metrics = self.trained(
                str(self.out / name), f"{name}_{rates[1]:g}", max_steps=steps - first, learning_rate=rates[1],
                data_seed=1,
            )  # fmt: skip
            return {"loss": self.loss(run), "seconds": metrics["train_runtime"]}

        one = self.once(f"{name}_pruned", pruned)
        two = self.once(f"{name}_{rates[1]:g}", measure)
        return {"before": one["loss"], "loss": two["loss"], "seconds": one["seconds"] + two["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.6])
    parser.add_argument("--svd", type=float, nargs="+", default=[0.6, 0.9])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--length", type=int, default=512, help="tokens of a step")
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--basis-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    given = parser.parse_args()
    bench = Bench(given.out, given.train, given.held, given.tokens, given.length)
    table = [["original", "1", "-", f"{bench.dense()['before']:.4f}", "-", "-"]]
    for kept in given.kept:
        for first in given.basis_rates:
            for rate in given.rates:
                found = bench.basis(kept, (first, rate), given.steps, given.new)
                table.append(["basis", f"{kept:g}", f"{first:g}, {rate:g}", *_numbers(found)])
    for kept in given.svd:
        for rate in given.rates:
            table.append(["svd", f"{kept:g}", f"{rate:g}", *_numbers(bench.svd(kept, rate, given.steps))])
    heads = ["row", "kept", "rate", "loss before (svd: no training; basis: pruned)", "loss", "seconds"]
    show_table(f"{given.steps} steps of {given.length} tokens", heads, table)


def _numbers(found: dict[str, Any]) -> list[str]:
    return [f"{found['before']:.4f}", f"{found['loss']:.4f}", f"{found['seconds']:.0f}"]


if __name__ == "__main__":
    main()
