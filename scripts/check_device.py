"""Run every path on this machine's accelerator (the CPU where there is none): one line each with seconds and memory.

    python scripts/check_device.py [--size 64] [--json FILE] [--only WORD]

A random Llama of hidden size `--size`, its tokenizer and this package's own source as text; nothing is downloaded. Each
packed format is quantized, decoded and multiplied with, forward and backward; each method, budget and option that takes
another way through `decompose` runs; then loading, training in every mode, merging, folding, evaluation and exports.
Larger sizes tell times: at the default they are those of launching. Exits with 1 if a path failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import lord_tune
from lord_tune.console import human_bytes
from lord_tune.integrations.models import default_device, load_dense_or_factored, quiet
from lord_tune.memory import PeakMemory, synchronize
from lord_tune.quantizers import QUANTIZERS, Rotated

RUNS: dict[str, dict[str, Any]] = {
    "kept fraction by loss": {"kept_fraction": 0.7},
    "afm, sequential": {"method": "afm", "kept_fraction": 0.7, "propagate": "sequential"},
    "shrinkage and recovery": {"rank": 8, "shrinkage": "auto", "recover_epochs": 1},
    "svd, uniform": {"method": "svd", "kept_fraction": 0.7, "allocation": "uniform"},
    "nf4, loftq": {"method": "loftq", "backbone": "nf4", "rank": 8, "double_quant": True},
    "spqr": {"backbone": "spqr", "rank": 8},
    "int4 factors, first finer": {"backbone": "int4", "rank": 8, "factor_format": "int4", "top_rank": 2},
    "caldera, e8-2": {"method": "caldera", "backbone": "e8-2", "rank": 8, "iterations": 1},
    "caldera, fisher": {"method": "caldera", "backbone": "lloyd3", "rank": 8, "iterations": 1, "weighting": "fisher"},
}
MODES = ("factors", "split", "lora", "scales", "basis")
EXPORTS = ("dense", "factored", "peft")


class Paths:
    """What was run, and how it went."""

    def __init__(self, device: torch.device, only: str):
        self.device, self.only = device, only
        self.results: list[dict[str, Any]] = []

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run a path unless --only leaves it out. What it prints is shown if it fails."""
        if self.only not in name:
            return
        said, error = io.StringIO(), None
        start = time.perf_counter()
        with PeakMemory(self.device) as peak, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                work()
                synchronize(self.device)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
                traceback.print_exc()
        seconds = time.perf_counter() - start
        entry = {"path": name, "ok": error is None, "seconds": seconds, "peak_bytes": peak.bytes, "error": error}
        self.results.append(entry)
        print(f"{name:42} {'ok' if error is None else 'FAILED':6} {seconds:8.2f} s {human_bytes(peak.bytes):>10}")
        if error is not None:
            print("\n".join(said.getvalue().splitlines()[-12:]))


def make_model(folder: Path, size: int) -> None:
    """A random Llama of two blocks with a tokenizer of bytes."""
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    alphabet = sorted(ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<eos>", "<pad>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=256, **special).save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=size,
        intermediate_size=5 * size // 2 // 64 * 64 or 64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=264,
        max_position_embeddings=256,
        initializer_range=1 / math.sqrt(size),
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_text(file: Path, documents: int = 12) -> None:
    """JSONL rows of this package's source."""
    sources = sorted(Path(lord_tune.__file__).parent.rglob("*.py"), key=lambda path: -path.stat().st_size)[:documents]
    file.write_text("".join(json.dumps({"text": path.read_text()[:3000]}) + "\n" for path in sources))


def product(form: Any, size: int, device: torch.device) -> None:
    """Quantize, decode and multiply, forward and backward; compared with the decoded matrix."""
    shape = (size + 8, size)
    weight = torch.randn(shape, device=device)
    x = torch.randn(3, size, device=device, requires_grad=True)
    parts = form.quantize(weight)
    decoded = form.dequantize(parts, shape, torch.float32)
    result = form.linear(x, parts, shape)
    result.sum().backward()
    assert x.grad is not None
    for found, expected in ((result, x @ decoded.T), (x.grad, decoded.sum(0).expand(3, -1))):
        error = float((found - expected).norm() / expected.norm())
        if not error < 1e-2:  # reduced-precision products included
            raise AssertionError(f"a product is off by {error:.2g} of its norm")


def one_step(folder: Path, mode: str, ids: torch.Tensor, device: torch.device) -> None:
    """Expose, one step, disable, merge, unmerge, save, fold."""
    model = load_dense_or_factored(str(folder))
    add = {"lora": lord_tune.add_lora, "scales": lord_tune.add_scales, "basis": lord_tune.add_basis}.get(mode)
    model = lord_tune.expose_factors(model, mode=mode) if add is None else add(model)
    ids = ids.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            model(input_ids=ids)
        merged = lord_tune.merge(model)(input_ids=ids).logits
        lord_tune.unmerge(model)
        model.save_pretrained(folder.parent / f"adapter-{mode}")
        folded = lord_tune.fold(model)(input_ids=ids).logits
    for other in (merged, folded):
        if not torch.allclose(other, trained, atol=0.02, rtol=0.02):
            raise AssertionError("merged or folded, the model gives other logits")


def check(size: int, only: str, folder: Path) -> list[dict[str, Any]]:
    """Every path in order; later ones use what earlier ones wrote."""
    device = default_device()
    paths = Paths(device, only)
    model, text = folder / "model", folder / "text.jsonl"
    make_model(model, size)
    make_text(text)
    for name, form in QUANTIZERS.items():
        paths.run(f"format {name}", lambda form=form: product(form(), size, device))
    paths.run("format e8-2, rotated", lambda: product(Rotated(QUANTIZERS["e8-2"]()), size, device))
    for name, options in RUNS.items():
        own = dict(options)
        if own.get("method") not in ("svd", "loftq"):
            own |= {"calibration": [str(text)], "calibration_tokens": 1024, "context_length": 128}
        if "kept_fraction" in own and "calibration" in own or "weighting" in own:
            own["sensitivity_tokens"] = 256
        paths.run(f"decompose {name}", lambda n=name, own=own: lord_tune.decompose(str(model), str(folder / n), **own))
    base, packed = folder / "nf4, loftq", folder / "int4 factors, first finer"
    ids = torch.arange(48)[None]
    for mode in MODES:
        start = packed if mode == "split" else base
        paths.run(f"adapter {mode}", lambda mode=mode, start=start: one_step(start, mode, ids, device))
        given = {"model_name_or_path": str(start), "dataset_name": str(text), "max_steps": 2, "max_length": 64}
        given |= {"basis_share": 0.5, "basis_every": 1} if mode == "basis" else {}
        given |= {"output_dir": str(folder / f"train-{mode}"), "mode": mode, "per_device_train_batch_size": 2}
        paths.run(f"train {mode}", lambda given=given: lord_tune.train(**given))
    run = str(folder / "train-factors")
    given = {"text": [str(text)], "context_length": 128, "max_tokens": 512}
    paths.run("evaluate", lambda: lord_tune.evaluate(run, **given))
    for form in EXPORTS:
        paths.run(f"export {form}", lambda form=form: lord_tune.export(run, str(folder / f"to-{form}"), form))
    return paths.results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="hidden size of the model, a multiple of 64")
    parser.add_argument("--only", default="", help="run the paths whose names contain this word alone")
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args(arguments)
    if options.size < 64 or options.size % 64:
        parser.error(f"got --size {options.size}, expected a multiple of 64")
    device = default_device()
    print(f"{device}, torch {torch.__version__}, hidden size {options.size}")
    quiet()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = check(options.size, options.only, Path(folder))
    failed = [entry["path"] for entry in results if not entry["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} paths ok; failed: {', '.join(failed) or 'none'}")
    if options.json:
        content = {"device": str(device), "torch": torch.__version__, "size": options.size, "paths": results}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
