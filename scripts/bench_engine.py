"""Measure the engine: memory against depth, a billion parameters, time against irreducible work, processes, families.

    python scripts/bench_engine.py OUT [--parts memory big time processes real] [--models DIR]     1-2 hours on 2 cores

memory     random Llamas of one block size with 4, 16 and 64 blocks: peak resident memory of the decompose process
big        a random Llama of TinyLlama's shape (1.1 billion parameters, bfloat16), NF4 and LoRD
time       SmolLM2-135M, 16k tokens: the run over one forward pass + Gram products + one eigenproblem per layer
processes  the same with 2 processes of 1 thread over 1 process of 1 thread
real       what is lost on real models (folders in --models: qwen-coder, minilm, mpnet; others are skipped)

Every run is a `lord-tune decompose` of its own process; its time and peak are those it writes to decomposition.json.
Finished rows are kept in OUT/bench.json and not measured again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lord_tune
from lord_tune.adapters.loading import load
from lord_tune.calibration.corpus import token_windows
from lord_tune.calibration.moments import add_gram
from lord_tune.console import say, show_table
from lord_tune.data.texts import documents
from lord_tune.demo import standard_library_files, write_rows
from lord_tune.integrations.models import quiet
from lord_tune.integrations.sources import resolve_model
from lord_tune.layers import is_linear, shape_of
from lord_tune.storage import read_json, write_json

GIB = 2**30
TOKENS = 16384
REPEATS = 2


class Bench:
    """Rows measured once and kept."""

    def __init__(self, folder: Path, models: Path | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.models, self.file = folder, models, folder / "bench.json"
        self.rows: dict[str, Any] = read_json(self.file) if self.file.exists() else {}
        self.code, self.held = folder / "code_train.jsonl", folder / "code_heldout.jsonl"
        train_files, held_files = standard_library_files()
        write_rows(train_files, self.code)
        write_rows(held_files, self.held)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.rows:
            say(f"--- {name}")
            self.rows[name] = measure()
            write_json(self.file, self.rows)
        return self.rows[name]

    def decompose(
        self, model: str, name: str, *options: Any, threads: int = 2, processes: int = 1, keep: bool = False
    ) -> dict[str, float]:
        """Totals of a run in processes of its own."""
        out = self.folder / name
        words = ["-m", "lord_tune", "decompose", model, str(out), "--calibration", str(self.code), "--overwrite"]
        start = [sys.executable]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launch = ["--multi_gpu", "--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no"]
            launch += ["--dynamo_backend", "no", "--main_process_port", port]
            start = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launch)]
            environment |= {"ACCELERATE_USE_CPU": "true"}
        begin = time.perf_counter()
        subprocess.run([*start, *words, *map(str, options)], check=True, env=environment, stdout=subprocess.DEVNULL)
        totals = read_json(out / "decomposition.json")["totals"]
        totals["wall_seconds"] = time.perf_counter() - begin
        if not keep:
            shutil.rmtree(out)
        return totals


# --- random Llamas ---

_RANDOM_LLAMA = """
import sys, torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
out, dtype, hidden, wide, blocks, heads, kv, vocabulary = sys.argv[1:3] + [int(n) for n in sys.argv[3:]]
torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, dtype))
config = LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=blocks, num_attention_heads=heads,
                     num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=2048)
LlamaForCausalLM(config).save_pretrained(out, max_shard_size="500MB")
letters = {symbol: index + 3 for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
"""


def random_llama(bench: Bench, name: str, dtype: str, *shape: int) -> str:
    """A checkpoint; shape: hidden, intermediate, blocks, heads, key-value heads, vocabulary."""
    folder = bench.folder / name
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "-c", _RANDOM_LLAMA, str(folder), dtype, *map(str, shape)], check=True)
    return str(folder)


def memory(bench: Bench) -> None:
    rows = []
    plans = {
        "LoRD, loss_weighted": ["--kept-fraction", 0.8],
        "NF4 + rank 16": ["--backbone", "nf4", "--rank", 16],
    }
    for label, plan in plans.items():
        peaks = []
        for blocks in (4, 16, 64):

            def measure(blocks: int = blocks, plan: list = plan) -> dict[str, float]:
                model = random_llama(bench, f"llama_{blocks}", "float32", 768, 2048, blocks, 12, 4, 4096)
                options = ["--calibration-tokens", 4096, "--sensitivity-tokens", 1024]
                return bench.decompose(model, f"out_{blocks}", *plan, *options, threads=1)

            peaks.append(bench.once(f"memory, {label}, {blocks} blocks", measure))
        for blocks, totals in zip((4, 16, 64), peaks, strict=True):
            rows.append(
                [
                    f"{label}, {blocks} blocks",
                    f"{totals['model_bytes_before'] / 1e6:.0f} MB",
                    f"{totals['peak_memory_bytes'] / GIB:.3f} GiB",
                    f"{totals['peak_memory_bytes'] / peaks[0]['peak_memory_bytes']:.3f}",
                    f"{totals['estimated_peak_memory_bytes'] / totals['peak_memory_bytes']:.2f}",
                ]
            )
    columns = ["random Llama, 768 x 2048", "weights", "peak memory", "over 4 blocks (<= 1.15)", "estimated / measured"]
    show_table("memory and depth, calibrated on 4k tokens", columns, rows)


def big(bench: Bench) -> None:
    rows = []
    plans = {
        "NF4 + rank 32": ["--backbone", "nf4", "--rank", 32],
        "LoRD, 20 % removed, loss_weighted": ["--kept-fraction", 0.8],
    }
    for label, plan in plans.items():

        def measure(plan: list = plan) -> dict[str, float]:
            model = random_llama(bench, "llama_big", "bfloat16", 2048, 5632, 22, 32, 4, 32000)
            return bench.decompose(model, "out_big", *plan, "--calibration-tokens", 4096, threads=1)

        totals = bench.once(f"big, {label}", measure)
        rows.append(
            [
                label,
                f"{totals['parameters_before'] / 1e9:.2f} billion",
                f"{totals['model_bytes_before'] / GIB:.2f} GiB",
                f"{totals['peak_memory_bytes'] / GIB:.2f} GiB",
                f"{totals['estimated_peak_memory_bytes'] / totals['peak_memory_bytes']:.2f}",
                f"{totals['seconds'] / 60:.1f} min",
            ]
        )
    columns = [
        "TinyLlama's shape, bfloat16",
        "parameters",
        "weights",
        "peak (<= 3 GiB)",
        "estimated / measured",
        "time",
    ]
    show_table("a billion parameters, calibrated on 4k tokens", columns, rows)


# --- time ---


def irreducible(model: str, code: Path, threads: int) -> dict[str, float]:
    """Seconds of the forward pass of the calibration windows, of the Gram products of each distinct input, and of one
    symmetric eigenproblem per layer."""
    torch.set_num_threads(threads)
    dense, tokenizer = load(model)
    windows, _ = token_windows(documents([str(code)]), tokenizer, TOKENS, TOKENS // 16, 1024, 0)
    layers = {n: m for n, m in dense.model.layers.named_modules() if is_linear(m)}
    inputs: dict[int, torch.Tensor] = {}
    firsts: list[torch.Tensor] = []

    def keep(module: Any, args: tuple) -> None:
        if id(args[0]) not in inputs:
            inputs[id(args[0])] = args[0]
            firsts.append(args[0][0])

    handles = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    with torch.no_grad():
        dense.model(input_ids=windows[:1], use_cache=False)
        for handle in handles:
            handle.remove()
        start = time.perf_counter()
        for window in windows:
            dense.model(input_ids=window[None], use_cache=False)
        forward = time.perf_counter() - start
        start = time.perf_counter()
        for rows in firsts:
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            for _ in range(len(windows)):
                add_gram(total, rows)
        gram = time.perf_counter() - start
        start = time.perf_counter()
        for layer in layers.values():
            k = min(shape_of(layer))
            symmetric = torch.randn(k, k, dtype=torch.float64)
            torch.linalg.eigh(symmetric + symmetric.T)
        eigen = time.perf_counter() - start
    return {"forward": forward, "gram": gram, "eigen": eigen}


def timing(bench: Bench) -> None:
    model = resolve_model("demo")
    plans = {
        "dense, uniform": ["--kept-fraction", 0.9, "--allocation", "uniform"],
        "sequential, uniform": ["--kept-fraction", 0.9, "--allocation", "uniform", "--propagate", "sequential"],
        "dense, loss_weighted": ["--kept-fraction", 0.9],
    }

    def measure() -> list[dict[str, Any]]:
        runs = []
        for _ in range(REPEATS):  # interleaved: the machine's speed drifts
            base = irreducible(model, bench.code, 2)
            found = {label: bench.decompose(model, "out", *plan)["seconds"] for label, plan in plans.items()}
            runs.append({"base": base, "runs": found})
        return runs

    runs = bench.once("time", measure)
    floors = [sum(run["base"].values()) for run in runs]
    parts = {key: statistics.median(run["base"][key] for run in runs) for key in runs[0]["base"]}
    rows = []
    targets = {"dense, uniform": "<= 1.6", "dense, loss_weighted": ""}
    for label in plans:
        ratio = statistics.median(run["runs"][label] / floor for run, floor in zip(runs, floors, strict=True))
        seconds = statistics.median(run["runs"][label] for run in runs)
        rows.append([label, f"{seconds:.1f} s", f"{ratio:.2f}", targets.get(label, "")])
    extra = statistics.median(
        (run["runs"]["sequential, uniform"] - run["runs"]["dense, uniform"]) / run["base"]["forward"] for run in runs
    )
    show_table(
        f"SmolLM2-135M, {TOKENS} tokens, 2 threads, medians of {len(runs)} interleaved runs; forward "
        f"{parts['forward']:.1f} s, Gram products {parts['gram']:.1f} s, eigenproblems {parts['eigen']:.1f} s",
        ["propagate, allocation", "seconds", "over the irreducible", "target"],
        rows,
    )
    say(f"sequential adds {extra:.2f} forward passes (target: at most 1)")


def processes(bench: Bench) -> None:
    model = resolve_model("demo")

    def measure() -> list[dict[str, float]]:
        plan = ["--kept-fraction", 0.9]
        runs = []
        for _ in range(REPEATS):
            one = bench.decompose(model, "out", *plan, threads=1)
            two = bench.decompose(model, "out", *plan, threads=1, processes=2)
            runs.append({"one": one["seconds"], "two": two["seconds"]})
        return runs

    runs = bench.once("processes", measure)
    speedup = statistics.median(run["one"] / run["two"] for run in runs)
    one, two = (statistics.median(run[key] for run in runs) for key in ("one", "two"))
    rows = [["LoRD, 10 % removed, loss_weighted", f"{one:.1f} s", f"{two:.1f} s", f"{speedup:.2f}", ">= 1.6"]]
    columns = ["SmolLM2-135M, 16k tokens, 1 thread each", "1 process", "2 processes", "speed-up", "target"]
    show_table(f"processes, medians of {len(runs)} interleaved runs", columns, rows)


# --- real models ---


def embeddings(folder: str, sentences: list[str]) -> torch.Tensor:
    """Mean-pooled last hidden states. (sentence, width)"""
    model, tokenizer = load(folder)
    found = []
    with torch.no_grad():
        for sentence in sentences:
            ids = torch.tensor([tokenizer(sentence, verbose=False)["input_ids"][:128]])
            found.append(model(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(found)


def prose(bench: Bench) -> tuple[Path, list[str]]:
    """Python's help texts: a file to calibrate on, and sentences of other topics."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    texts = [" ".join(topics[name].split()) for name in names]
    calibration = bench.folder / "prose.txt"
    calibration.write_text("\n\n".join(text for index, text in enumerate(texts) if index % 4))
    other = " ".join(text for index, text in enumerate(texts) if index % 4 == 0)
    sentences = [part for part in other.split(". ") if 60 < len(part) < 400]
    return calibration, sentences[:200]


_PLANS: dict[str, dict[str, Any]] = {
    "NF4 alone": {"method": "svd", "rank": 0, "backbone": "nf4"},
    "NF4 + LoftQ, rank 16": {"method": "loftq", "rank": 16, "backbone": "nf4"},
    **{
        f"{form} + whitened, rank 16, rounded {how}": {"rank": 16, "backbone": form, "rounding": rounding}
        for form in ("nf4", "q4_0", "int4")
        for how, rounding in (("to nearest", "nearest"), ("with feedback", "feedback"))
    },
    "LoRD, 10 % removed, uniform": {"kept_fraction": 0.9, "allocation": "uniform"},
    "LoRD, 10 % removed, loss_weighted": {"kept_fraction": 0.9},
}


def real(bench: Bench) -> None:
    encoders = [name for name in ("minilm", "mpnet") if bench.models and (bench.models / name).is_dir()]
    if bench.models and (bench.models / "qwen-coder").is_dir():
        _code_model(bench, str(bench.models / "qwen-coder"))
    for name in encoders:
        _encoder(bench, name, str(bench.models / name))  # type: ignore[operator]


def _code_model(bench: Bench, model: str) -> None:
    def measured(folder: str) -> dict[str, float]:
        original = None if folder == model else model
        found = lord_tune.evaluate(folder, text=[str(bench.held)], max_tokens=4096, original=original)
        beside = found.get("original", {"kl": 0.0, "kl_standard_error": 0.0})
        return {"perplexity": found["perplexity"], "kl": beside["kl"], "kl_error": beside["kl_standard_error"]}

    dense = bench.once("qwen-coder, dense", lambda: measured(model))
    rows = [["dense", f"{dense['perplexity']:.3f}", "", "", ""]]
    for label, plan in _PLANS.items():

        def measure(plan: dict = plan) -> dict[str, float]:
            words = [w for key, value in plan.items() for w in (f"--{key.replace('_', '-')}", value)]
            options = [] if plan.get("method") in ("svd", "loftq") else ["--calibration-tokens", 8192]
            totals = bench.decompose(model, "qwen", *words, *options, keep=True)
            return totals | measured(str(bench.folder / "qwen"))

        entry = bench.once(f"qwen-coder, {label}", measure)
        size = f"{entry['linear_bits_per_weight']:.2f}"
        kl = f"{entry['kl']:.4f} +- {entry['kl_error']:.4f}"
        rows.append([label, f"{entry['perplexity']:.3f}", kl, size, f"{entry['peak_memory_bytes'] / GIB:.2f} GiB"])
    columns = ["Qwen2.5-Coder-0.5B, calibrated on 8k tokens", "perplexity", "KL to dense", "bits/weight", "peak memory"]
    show_table("one shot, other files of the standard library", columns, rows)


def _encoder(bench: Bench, name: str, model: str) -> None:
    calibration, sentences = prose(bench)
    rows = []
    for label, plan in _PLANS.items():

        def measure(plan: dict = plan, label: str = label) -> dict[str, float]:
            out = str(bench.folder / name)
            text = {} if plan.get("method") in ("svd", "loftq") else {"calibration": [str(calibration)]}
            text |= {"context_length": 128, "calibration_tokens": TOKENS} if text else {}
            lord_tune.decompose(model, out, overwrite=True, **plan, **text)
            before, after = embeddings(model, sentences), embeddings(out, sentences)
            cosine = torch.nn.functional.cosine_similarity(before, after)
            return {"mean": float(cosine.mean()), "worst": float(cosine.min())}

        entry = bench.once(f"{name}, {label}", measure)
        rows.append([label, f"{entry['mean']:.4f}", f"{entry['worst']:.4f}"])
    columns = [f"{name}, calibrated on 16k tokens of prose", "mean cosine", "worst cosine"]
    show_table("embeddings of 200 other sentences, against the dense model's", columns, rows)


PARTS = {"memory": memory, "big": big, "time": timing, "processes": processes, "real": real}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", type=Path)
    arguments = parser.parse_args()
    quiet()
    bench = Bench(arguments.out, arguments.models)
    for part in arguments.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
