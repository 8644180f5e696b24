"""Measure recovery and print it beside its targets, its baselines and the dense control.

    python scripts/bench_recovery.py OUT [--parts nf4 lord blocks long one_shot memory time] [--only SUBSTRING]
                                         [--wikitext FILE]

SmolLM2-135M, one thread. Held-out losses are in nats per token on 8k tokens.

nf4     initialisations of L and R at equal trainable parameters, steps and data (NF4, rank 16): whitened beside Q
        rounded with feedback, and to the nearest; LoftQ, QPiSSA (Q = NF4 of what the first 16 singular components
        leave) and QLoRA (L = 0). Every one is trained at every rate of one grid with the first seed, and at its best
        rate with two more seeds.
lord    20 % of the linears removed, then sft and distill, and as the control the dense model, whose linears are all
        tuned on the same rows; grid and seeds as above.
long    the same for 98k tokens, one seed; and after `blocks`, from what that wrote.
blocks  block-wise recovery inside `decompose`, no end-to-end training.
one_shot  20 % removed, then 123k tokens of whole files of distillation mixed with next tokens; as controls the dense
        model, whose linears are all tuned on the same rows by next tokens, at the same rate and at a third of it. One
        seed.
memory  QLoRA over LoRD against QLoRA on one batch, tensor by tensor, in bfloat16.
time    steps of mode factors at 20 % removed against LoRA on the dense model, interleaved.

bfd packing, trl's default, trains on the first `max_length` tokens of each file alone, 28k and 57k different ones here;
only the row "whole files" does not.

Text: standard-library files of this Python (top level) to calibrate and train on; to measure on, files of its `idlelib`
and `distutils/command`, and with --wikitext a file of WikiText-2. Finished rows are kept in OUT/rows and not measured
again, so several processes may share OUT (--only).
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_spine import Bench as SpineBench
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lord_tune
from lord_tune.adapters.loading import load
from lord_tune.console import human_bytes, say, show_table
from lord_tune.factorizations import Factors, PlainSVD, truncate
from lord_tune.integrations.models import quiet, save_model
from lord_tune.layers import factored_layers, weight_of
from lord_tune.storage import atomic_directory, read_json, write_json
from lord_tune.training import trainer_arguments
from lord_tune.training.data import prepare_rows
from lord_tune.training.memory import account
from lord_tune.training.trainers import SupervisedTrainer

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
LONG = {"max_steps": 96, "max_length": 512, "per_device_train_batch_size": 2, "bf16": True}  # 98,304 tokens
LONG_RATE = 2e-4  # with batches four times as large, twice the best rate of part `lord`


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
            shutil.rmtree(out, ignore_errors=True)  # of a benchmark that was stopped
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
    if kind in ("whitened", "nearest"):
        rounding = "nearest" if kind == "nearest" else "feedback"
        text = {"calibration": [str(bench.code)], "calibration_tokens": 32768}
        lord_tune.decompose(bench.dense, str(folder), rounding=rounding, **text, **stored)
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
    for kind in ("whitened", "nearest", "loftq", "qpissa", "qlora"):
        base = initialised(bench, kind)
        start = bench.once(f"nf4-{kind}-start", lambda base=base: bench.losses(base))
        found, best = grid(
            f"nf4-{kind}", GRID, lambda row, base=base, **given: bench.trained(row, base, **SHORT, **given)
        )
        if start and found:
            tried = [bench.once(f"nf4-{kind}-{rate:g}-0", dict)["loss"]["code"] for rate in GRID]
            ends = spread([run["loss"]["code"] for run in found])
            rows.append([kind, f"{start['code']:.4f}", ends, best, ", ".join(f"{loss:.4f}" for loss in tried)])
    columns = ["L, R", "start", "end: median (min-max) of 3 seeds", "rate", f"seed 0 at {', '.join(map(str, GRID))}"]
    show_table("NF4 + rank 16: held-out loss on code, 32 x 256 tokens", columns, rows)


def spread(values: list[float]) -> str:
    ends = f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.4f}{ends}"


# --- low rank alone ---

KEPT = 0.8
LORD_GRID = (3e-5, 1e-4, 3e-4)
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "distill": {"objective": "distill"},
    "distill + CE": {"objective": "distill", "distill_ce_weight": 0.5},
}


def lord_20(bench: Bench) -> str:
    """20 % removed, calibrated on 16k tokens."""
    folder = bench.folder / "lord_20"
    if not folder.is_dir():
        lord_tune.decompose(bench.dense, str(folder), **calibrated(bench, 16384))
    return str(folder)


def calibrated(bench: Bench, tokens: int) -> dict[str, Any]:
    return {
        "kept_fraction": KEPT,
        "calibration": [str(bench.code)],
        "calibration_tokens": tokens,
        "context_length": 512,
    }


def tuned_dense(bench: Bench, name: str, **options: Any) -> dict[str, Any] | None:
    """Losses after all linears of the dense model's blocks were trained as L and R are."""

    def measure() -> dict[str, Any]:
        model, tokenizer = load(bench.dense)
        linears = blocks_linears(model)
        model.requires_grad_(False)
        for layer in linears.values():
            layer.weight.requires_grad_(True)
        rows, _ = prepare_rows(str(bench.code), "train", None, tokenizer)
        out = bench.folder / "runs" / name
        given = TRAIN | options | {"output_dir": str(out)}
        trainer = SupervisedTrainer(
            model, trainer_arguments(given, "factors", True, []), train_dataset=rows, processing_class=tokenizer
        )
        seconds = trainer.train().metrics["train_runtime"]
        save_model(model, tokenizer, out)
        found = {"loss": bench.losses(str(out)), "history": trainer.state.log_history, "seconds": seconds}
        shutil.rmtree(out)
        return found

    return bench.once(name, measure)


def blocks_linears(model: Any) -> dict[str, Any]:
    heads = (model.get_output_embeddings(),)
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m not in heads}


def gap_rows(bench: Bench, runs: dict[str, list[dict[str, Any]]], rates: dict[str, str]) -> list[list[str]]:
    dense = bench.once("dense", lambda: bench.losses(bench.dense))
    start = bench.once("lord-start", lambda: bench.losses(lord_20(bench)))
    texts = list(start)

    def row(name: str, found: list[dict[str, float]], rate: str = "") -> list[str]:
        cells = [name, rate]
        for text in texts:
            values = [losses[text] for losses in found]
            middle = statistics.median(values)
            closed = (start[text] - middle) / (start[text] - dense[text])
            cells += [
                spread(values) if len(values) > 1 else f"{middle:.4f}",
                f"{math.exp(middle):.2f}",
                f"{closed:.0%}",
            ]
        return cells

    rows = [row("dense", [dense]), row("20 % removed", [start])]
    return rows + [row(name, [run["loss"] for run in found], rates[name]) for name, found in runs.items() if found]


def columns(bench: Bench) -> list[str]:
    texts = ["code"] + (["WikiText-2"] if len(bench.texts) > 1 else [])
    return ["", "rate"] + [f"{text}: {what}" for text in texts for what in ("loss", "perplexity", "gap closed")]


def grid(name: str, rates: tuple[float, ...], run: Callable[..., Any]) -> tuple[list[dict[str, Any]], str]:
    """Runs at the best rate, three seeds; the rate."""
    found = {rate: run(f"{name}-{rate:g}-0", learning_rate=rate, seed=0) for rate in rates}
    if not all(found.values()):
        return [], ""
    best = min(found, key=lambda rate: found[rate]["loss"]["code"])
    more = [run(f"{name}-{best:g}-{seed}", learning_rate=best, seed=seed) for seed in SEEDS[1:]]
    return [found[best], *(entry for entry in more if entry)], f"{best:g}"


def lord(bench: Bench) -> None:
    runs, rates = {}, {}
    for name, options in METHODS.items():
        key = "lord-" + name.replace(" + ", "-").lower()
        runs[name], rates[name] = grid(
            key, LORD_GRID, lambda row, o=options, **given: bench.trained(row, lord_20(bench), **SHORT, **o, **given)
        )
    for name in ("sft", "distill + CE"):
        key = f"split-{name.replace(' + ', '-').lower()}-0.0001-0"
        given = {"learning_rate": 1e-4, "seed": 0, "packing_strategy": "bfd_split", **SHORT, **METHODS[name]}
        run = bench.trained(key, lord_20(bench), **given)
        runs[f"{name}, whole files"], rates[f"{name}, whole files"] = [run] if run else [], "0.0001"
    runs["control: dense, tuned"], rates["control: dense, tuned"] = grid(
        "lord-control", LORD_GRID, lambda row, **given: tuned_dense(bench, row, **SHORT, **given)
    )
    show_table("20 % removed, then 32 x 256 tokens", columns(bench), gap_rows(bench, runs, rates))


def long(bench: Bench) -> None:
    """One seed. From the one-shot decomposition, and from the one of part `blocks`."""
    mixed = METHODS["distill + CE"]
    given = {"learning_rate": LONG_RATE, "seed": 0, **LONG}
    found = {
        "sft": bench.trained("long-sft", lord_20(bench), **given),
        "distill + CE": bench.trained("long-distill-ce", lord_20(bench), **given, **mixed),
        "control: dense, tuned": tuned_dense(bench, "long-control", **given | {"learning_rate": LONG_RATE / 2}),
    }
    blocks = bench.folder / "blocks_tuned"
    if blocks.is_dir():
        found["block by block"] = bench.once("blocks-tuned", dict)
        found["block by block, then distill + CE"] = bench.trained("long-blocks", str(blocks), **given, **mixed)
        folded = bench.folder / "blocks_distilled"
        if found["block by block, then distill + CE"] and not folded.is_dir():
            lord_tune.export(str(bench.folder / "runs" / "long-blocks"), str(folded), "factored")
        more = given | {"seed": 1, "teacher_model_name_or_path": bench.dense}
        whole = {"max_steps": 40, "packing_strategy": "bfd_split"}  # whole files, not the first 512 tokens of each
        found["and 65k tokens more"] = bench.trained("long-more", str(folded), **more | {"max_steps": 64}, **mixed)
        found["or 41k tokens of whole files"] = bench.trained("long-whole", str(folded), **more | whole, **mixed)
    runs = {name: [run] if run else [] for name, run in found.items()}
    tokens = LONG["max_steps"] * LONG["max_length"] * LONG["per_device_train_batch_size"]
    rates = dict.fromkeys(runs, f"{LONG_RATE:g}")
    rates |= {"control: dense, tuned": f"{LONG_RATE / 2:g}", "block by block": f"{BLOCKS['recover_learning_rate']:g}"}
    rows = gap_rows(bench, runs, rates)
    show_table(f"20 % removed, then {tokens:,} tokens in bfloat16", columns(bench), rows)


ONE_SHOT = {
    "max_steps": 120,
    "max_length": 512,
    "per_device_train_batch_size": 2,
    "packing_strategy": "bfd_split",
    "learning_rate": 3e-5,
    "seed": 0,
}


def one_shot(bench: Bench) -> None:
    """From the one-shot decomposition, in float32."""
    slower = ONE_SHOT | {"learning_rate": 1e-5}
    found = {
        "distill + CE": bench.trained("one-shot-distill-ce", lord_20(bench), **ONE_SHOT, **METHODS["distill + CE"]),
        "control: dense, tuned": tuned_dense(bench, "one-shot-control", **ONE_SHOT),
        "control: dense, tuned slower": tuned_dense(bench, "one-shot-control-slower", **slower),
    }
    runs = {name: [run] if run else [] for name, run in found.items()}
    rates = dict.fromkeys(runs, "3e-05") | {"control: dense, tuned slower": "1e-05"}
    show_table("20 % removed, then 122,880 tokens of whole files", columns(bench), gap_rows(bench, runs, rates))


# --- block-wise recovery ---

BLOCKS = {"calibration_tokens": 65536, "recover_epochs": 2, "recover_learning_rate": 2e-3}


def blocks(bench: Bench) -> None:
    def measure(**options: Any) -> dict[str, Any]:
        folder = bench.folder / ("blocks_tuned" if options else "blocks_none")
        text = calibrated(bench, BLOCKS["calibration_tokens"])
        report = lord_tune.decompose(bench.dense, str(folder), overwrite=True, **text, **options)
        found = {"loss": bench.losses(str(folder)), "seconds": report["totals"]["seconds"]}
        return found | {"recovery": report["recovery"]}

    recovery = {key: value for key, value in BLOCKS.items() if key.startswith("recover")}
    plain = bench.once("blocks-none", measure)
    tuned = bench.once("blocks-tuned", lambda: measure(**recovery))
    dense = bench.once("dense", lambda: bench.losses(bench.dense))
    rows = []
    for name, run in (("one shot", plain), ("block by block", tuned)):
        if plain and run and dense:
            cells = [name, f"{run['seconds'] / 60:.0f}"]
            for text in dense:
                closed = (plain["loss"][text] - run["loss"][text]) / (plain["loss"][text] - dense[text])
                cells += [f"{run['loss'][text]:.4f}", f"{math.exp(run['loss'][text]):.2f}", f"{closed:.0%}"]
            rows.append(cells)
    show_table(f"20 % removed, {BLOCKS}", ["", "minutes", *columns(bench)[2:]], rows)


# --- memory ---


def qlora(bench: Bench) -> Any:
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(bench.dense, quantization_config=form, dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def qlora_over_lord(bench: Bench, kept: float, on: str) -> Any:
    """Memory does not depend on the numbers, so these are of plain SVD."""
    folder = bench.folder / f"lord_nf4_{kept}"
    if not folder.is_dir():
        stored = {"factor_format": "nf4", "double_quant": True, "allocation": "uniform"}
        lord_tune.decompose(bench.dense, str(folder), method="svd", kept_fraction=kept, **stored)
    return lord_tune.add_lora(load(str(folder), "bfloat16")[0], RANK, on=on)


KEPT_OF_LINEARS = {"79 % of the linears": 0.79, "79 % of the model": 0.734}
COUNTED = ("weights", "adapters", "optimizer", "activations")


def memory(bench: Bench) -> None:
    """Equal rank, batch, precision and optimizer."""
    cases = {"QLoRA": lambda: qlora(bench)}
    for label, kept in KEPT_OF_LINEARS.items():
        for on in ("both", "smaller"):
            cases[f"over LoRD, {label}, LoRA on {on}"] = lambda k=kept, o=on: qlora_over_lord(bench, k, o)
    for checkpointing in (True, False):
        found: dict[str, dict[str, int]] = {}
        for number, (name, build) in enumerate(cases.items()):

            def measure(build: Any = build, checkpointing: bool = checkpointing) -> dict[str, int]:
                model = build()
                if checkpointing:
                    model.enable_input_require_grads()
                    model.gradient_checkpointing_enable()
                ids = torch.randint(0, 49000, (1, 512), generator=torch.Generator().manual_seed(0))
                batch = {"input_ids": ids, "labels": ids, "use_cache": False}
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
                return account(model, batch, optimizer, autocast=torch.bfloat16).to_dict()

            entry = bench.once(f"memory-{'checkpointing' if checkpointing else 'plain'}-{number}", measure)
            if entry:
                found[name] = entry
        if "QLoRA" not in found:
            continue
        whole = {name: sum(entry[part] for part in COUNTED) for name, entry in found.items()}
        rows = [
            [name, *(human_bytes(entry[part]) for part in COUNTED), human_bytes(whole[name])]
            + [f"{whole[name] / whole['QLoRA'] - 1:+.1%}", f"{entry['weights'] / found['QLoRA']['weights'] - 1:+.1%}"]
            for name, entry in found.items()
        ]
        title = f"rank {RANK}, 512 tokens, bfloat16, {'with' if checkpointing else 'without'} gradient checkpointing"
        show_table(title, ["", *COUNTED, "sum", "sum / QLoRA", "weights / QLoRA"], rows)


# --- time ---


def time_of_steps(bench: Bench) -> None:
    """Forward, backward and optimizer step of one batch, taken in turns."""

    def measure() -> dict[str, list[float]]:
        dense, _ = load(bench.dense)
        models = {
            "dense + LoRA": get_peft_model(dense, LoraConfig(r=RANK, target_modules="all-linear")),
            "factors": lord_tune.expose_factors(load(lord_20(bench))[0]),
        }
        optimizers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for n, m in models.items()}
        ids = torch.randint(0, 49000, (1, 512), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(8):
            for name, model in models.items():
                start = time.perf_counter()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        return seconds

    seconds = bench.once("time", measure)
    if seconds:
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        rows = [[n, f"{s:.2f} s ({min(seconds[n]):.2f}-{max(seconds[n]):.2f})"] for n, s in middle.items()]
        rows.append(["ratio", f"{middle['factors'] / middle['dense + LoRA']:.2f} (target <= 1)"])
        show_table("a step of 512 tokens, medians of 7", ["", "measured"], rows)


PARTS: dict[str, Callable[[Bench], None]] = {
    "nf4": nf4,
    "lord": lord,
    "blocks": blocks,
    "long": long,
    "one_shot": one_shot,
    "memory": memory,
    "time": time_of_steps,
}


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
