"""The verb `correct`: what it reads, the adapter it writes for the quantized checkpoint, and what it tells."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CorrectConfig
from ..console import human_bytes, say, show_table
from ..errors import ExportMismatch, UsageError
from ..exports.base import Job
from ..exports.gguf import write_adapter_for
from ..exports.parts import Parts
from ..exports.source import Source, open_source
from ..exports.stock import ADAPTER, served_outputs, write_adapter
from ..exports.verify import PROBE_TOKENS, compare, probe_ids, probe_windows
from ..integrations.files import check_not_pointers
from ..integrations.running import kind_of, max_length
from ..layers import factored_layers, plain_model
from ..storage import read_json, sha256_files
from .base import Quantized
from .folder import QuantizedFolder
from .gguf_file import GGUFFile

SERVED = {"f16": "fp16", "q8_0": "q8_0", "f32": "fp32"}  # the format here of each type of a GGUF adapter


def open_quantized(name: str) -> Quantized:
    """UsageError for what is not quantized, or not in a way that is read."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"The file {name} does not exist; pass the quantized GGUF file.")
        if importlib.util.find_spec("gguf") is None:
            raise UsageError("A GGUF file is read by the package gguf; run: pip install gguf")
        check_not_pointers([path])
        return GGUFFile(path)
    if not (path / "config.json").is_file():
        raise UsageError(f"{name} is no .gguf file and no folder with a config.json; pass a quantized checkpoint.")
    if not read_json(path / "config.json").get("quantization_config"):
        raise UsageError(f"{name} is not quantized; pass a quantized checkpoint, or use lord-tune decompose.")
    return QuantizedFolder(path)


def adapter_in(folder: Path, config: CorrectConfig) -> dict[str, Any]:
    """Write the adapter into the finished checkpoint `folder`; entries of its report."""
    quantized = Path(config.quantized).expanduser()
    notes: list[str] = []
    target = folder / ADAPTER
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lord_tune_read_") as scratch:
        source, tokenizer = open_source(str(folder), Path(scratch))
        model = plain_model(source.model)
        ids = probe_windows(model, probe_ids(tokenizer, None, min(PROBE_TOKENS, max_length(model))))
        layers = {name: layer for name, layer in factored_layers(model).items() if layer.rank}
        parts = Parts(model, source, keep=True)
        if quantized.suffix.lower() == ".gguf":
            target.mkdir()
            job = Job(tokenizer, target, target, "float32", ids, adapter_type=config.adapter_type, notes=notes)
            expected = source.outputs(ids) if kind_of(model) == "causal" else None
            write_adapter_for(layers, quantized, job, parts, expected)
        else:
            write_adapter(model, tokenizer, target, layers, quantized, model.dtype, parts=parts)
            notes.append(_checked(quantized, target, ids, source))
    for words in notes:
        say(words)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.suffix in (".gguf", ".safetensors"))
    files = [quantized] if quantized.is_file() else sorted(quantized.glob("*.safetensors"))
    known = {"quantized": config.quantized, "quantized_sha256": sha256_files(files)}
    return known | {"adapter_bytes": size, "adapter_notes": notes}


def _checked(quantized: Path, adapter: Path, ids: Tensor, source: Source) -> str:
    """What the adapter gives on its base, in a sentence; ExportMismatch if that is not what the model gives."""
    model = plain_model(source.model)
    served = served_outputs(quantized, adapter, ids, model)
    if served is None:
        return "the adapter was not loaded on its base: the package that runs it is not installed"
    found = compare(source.outputs(ids), served, kind_of(model) != "bare")
    what, deviation = found.deviation()
    config_file = read_json(quantized / "config.json")
    computes = [config_file.get(key) for key in ("dtype", "torch_dtype")]
    computes.append(config_file["quantization_config"].get("bnb_4bit_compute_dtype"))
    limit = found.limit(["float32", str(model.dtype).removeprefix("torch."), *map(str, computes)])
    if not deviation <= limit:
        raise ExportMismatch(
            f"The adapter on {quantized} is not the corrected model: got a {what} of {deviation:.3g}, expected at most "
            f"{limit:.3g}."
        )
    return f"loaded on its base by stock transformers and PEFT: {found}"


def show_gain(report: dict[str, Any]) -> None:
    """Predicted and measured."""
    layers = [layer for layer in report["layers"].values() if layer["error_backbone"] is not None]
    squares = [math.fsum(layer[key] ** 2 for layer in layers) for key in ("error_backbone", "error_calibrated")]
    if layers and squares[0]:
        say(
            f"predicted: L R leaves {math.sqrt(squares[1] / squares[0]):.2f} of the layers' output errors on the "
            "calibration text"
        )
    losses = report.get("heldout_losses", {})
    if losses:
        start, rows = losses["original"], []
        gap = losses["quantized"] - start
        words = {
            "original": "original layers",
            "quantized": "as quantized",
            "corrected": "with L R",
            "control": "the same bytes in larger types, without L R",
        }
        for name, loss in losses.items():
            share = f"{(loss - start) / gap:.2f}" if gap > 0 else "-"
            rows.append([words[name], f"{loss:.4f}", f"{math.exp(min(loss, 80)):.3f}", share])
        show_table("held-out text", ["layers", "nats per token", "perplexity", "of the gap"], rows)
    say(f"adapter: {human_bytes(report['adapter_bytes'])} in {ADAPTER}/ of the checkpoint")
